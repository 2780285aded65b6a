import io

import numpy as np
import pytest
from data.photos import photos
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clip_jax.data.duplicates import (
    MAX_DIFFERENT_BITS,
    UNCOMPARED,
    difference_hash,
    digest,
    equal_groups,
    look_alike_groups,
)


@given(st.lists(st.integers(0, 6), max_size=40))
def test_equal_values_are_grouped(values):
    found = equal_groups(np.array(values, np.uint64))
    members = {v: [i for i, other in enumerate(values) if other == v] for v in values}
    repeated = sorted((g for g in members.values() if len(g) > 1), key=lambda g: (-len(g), g[0]))
    assert found.num_groups == len(repeated)
    assert found.num_extra == len(values) - len(members)
    assert [group.size for group in found.largest] == [len(g) for g in repeated[:6]]
    assert [group.members for group in found.largest] == [g[:8] for g in repeated[:6]]


def components(hashes) -> set[frozenset[int]]:
    """By comparing all pairs."""
    label = list(range(len(hashes)))
    for i, a in enumerate(hashes):
        for j, b in enumerate(hashes[:i]):
            if UNCOMPARED not in (a, b) and (a ^ b).bit_count() <= MAX_DIFFERENT_BITS:
                old, new = label[i], label[j]
                label = [new if one == old else one for one in label]
    groups = ({i for i, one in enumerate(label) if one == name} for name in set(label))
    return {frozenset(group) for group in groups if len(group) > 1}


@given(st.integers(0, 2**32), st.integers(0, 5))
def test_look_alikes_are_those_of_all_pairs(seed, num_flips):
    rng = np.random.default_rng(seed)
    bases = rng.integers(1, 2**63, 4).tolist()
    hashes = []
    for base in bases:
        for _ in range(3):
            for bit in rng.choice(64, num_flips, replace=False).tolist():
                base ^= 1 << bit
            hashes.append(base)
    hashes += [UNCOMPARED, UNCOMPARED]
    found = look_alike_groups(np.array(hashes, np.uint64))
    expected = components(hashes)
    assert {frozenset(group.members) for group in found.largest} == expected
    assert found.num_extra == sum(len(group) - 1 for group in expected)


def test_few_or_no_pictures():
    for hashes in ([], [5], [UNCOMPARED] * 3):
        assert look_alike_groups(np.array(hashes, np.uint64)).num_groups == 0


def test_copies_of_photographs_look_alike_and_others_do_not():
    hashes = []
    for photo in photos():
        for size, quality in (((640, 427), 95), ((320, 214), 60), ((900, 600), 85)):
            photo.resize(size, Image.Resampling.LANCZOS).save(
                buffer := io.BytesIO(), "jpeg", quality=quality
            )
            hashes.append(difference_hash(Image.open(buffer)))
    for first in (0, 3):
        for other in (first + 1, first + 2):
            assert (hashes[first] ^ hashes[other]).bit_count() <= MAX_DIFFERENT_BITS
    assert (hashes[0] ^ hashes[3]).bit_count() > 16


def test_bits_say_what_is_brighter():
    pixels = np.zeros((8, 9, 3), np.uint8)
    pixels[:, 3] = 255
    pixels[2, 3], pixels[2, 8] = 0, 255
    # One byte to a row, its most significant bit on the left: brighter at places 2 and 7.
    expected = bytes([0x20, 0x20, 0x01, 0x20, 0x20, 0x20, 0x20, 0x20])
    assert difference_hash(Image.fromarray(pixels)) == int.from_bytes(expected, "big")


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((20, 30, 3), 77, np.uint8),
        np.repeat(np.arange(0, 200, 10, dtype=np.uint8), 90).reshape(20, 30, 3),
    ],
)
def test_pictures_without_structure_are_not_compared(pixels):
    assert difference_hash(Image.fromarray(pixels)) == UNCOMPARED


def test_digests_tell_bytes_apart():
    assert digest(b"a") == digest(b"a") != digest(b"b")
    assert 0 <= digest(b"") < 2**64
