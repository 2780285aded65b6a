import math
import zlib

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint.states import state_on
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small import mesh_of

from clip_jax.checkpoint import checksums, leaves_by_path
from clip_jax.checkpoint.checksums import (
    SavedArray,
    checked_part,
    checksum,
    from_json,
    hull,
    merged,
    overlap,
    slices,
    to_json,
)


def test_the_checksum_is_of_the_bytes_in_c_order():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert checksum(array) == zlib.crc32(array.tobytes())
    assert checksum(array.T) == zlib.crc32(np.ascontiguousarray(array.T).tobytes())
    assert checksum(np.float32(3)) == zlib.crc32(np.float32(3).tobytes())
    small = np.ones(3, ml_dtypes.bfloat16)
    assert checksum(small) == zlib.crc32(small.tobytes())
    assert checksum(-np.zeros(2)) != checksum(np.zeros(2))


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=0, max_size=3),
    st.integers(1, 400),
)
def test_pieces_make_up_the_part(axes, piece_bytes):
    box = tuple((start, start + size) for start, size in axes)
    array = np.arange(math.prod(b - a for a, b in box), dtype=np.int32)
    array = array.reshape([b - a for a, b in box])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checksums, "PIECE_BYTES", piece_bytes)
        part = checked_part(box, array)
    seen = np.zeros(array.shape, int)
    for piece, found in part.pieces():
        data = array[slices(piece, box)]
        assert checksum(data) == found
        assert data.nbytes <= max(piece_bytes, array[:1].nbytes if box else array.nbytes)
        seen[slices(piece, box)] += 1
    assert np.all(seen == 1)
    saved = {"x": SavedArray(array.shape, "int32", (part,))}
    assert saved["x"].is_covered()
    assert from_json(to_json(saved)) == saved


def test_boxes():
    one, other = ((0, 2), (3, 5)), ((1, 4), (0, 4))
    assert hull([one, other]) == ((0, 4), (0, 5))
    assert overlap(one, other)
    assert not overlap(one, ((2, 4), (3, 5)))
    assert overlap((), ())


def owned_bytes(leaves) -> dict[int, int]:
    """By device: what is copied to the host for checksums."""
    found: dict[int, int] = {}
    for number, leaf in enumerate(leaves.values()):
        for _, data in checksums._owned(number, leaf):
            (device,) = data.devices()
            found[device.id] = found.get(device.id, 0) + data.nbytes
    return found


@pytest.mark.parametrize("mesh", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_each_part_is_checksummed_by_one_owner(mesh):
    leaves = leaves_by_path(state_on(mesh_of(*mesh), 1))
    for number, (name, leaf) in enumerate(leaves.items()):
        parts = [checked_part(box, np.asarray(x)) for box, x in checksums._owned(number, leaf)]
        array = SavedArray(leaf.shape, leaf.dtype.name, tuple(parts))
        assert array.is_covered(), name
        assert len({part.box for part in parts}) == len(parts)


def test_replicas_take_turns():
    sharding = NamedSharding(mesh_of(8), P())
    leaves = {str(i): jax.device_put(np.ones(4), sharding) for i in range(16)}
    assert owned_bytes(leaves) == dict.fromkeys(range(8), 2 * leaves["0"].nbytes)


def test_parts_of_all_processes_come_together():
    one, other = (
        {"x": SavedArray((4,), "int32", (checked_part(((a, a + 2),), np.ones(2, np.int32)),))}
        for a in (0, 2)
    )
    both = merged([one, other])["x"]
    assert both.is_covered()
    assert not one["x"].is_covered()
    assert [part.box for part in both.parts] == [((0, 2),), ((2, 4),)]
