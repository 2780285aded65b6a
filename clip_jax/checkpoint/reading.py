"""Arrays from the disk: read once, checked, and put where they belong.

Orbax writes; what it wrote is read here by TensorStore, the library below it. Orbax's own `load`
checks nothing, and ends in a barrier: a process that finds a file unreadable would leave the others
waiting there. Here every process reads alone, what its devices need, and they agree afterwards.
"""

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from clip_jax.checkpoint.checksums import (
    Array,
    Box,
    box_of,
    checksum,
    hull,
    overlap,
    slices,
)
from clip_jax.checkpoint.paths import AnyPath, BucketPath
from clip_jax.checkpoint.record import DamagedError, Record, one_line

_THREADS = 8
_BATCH_BYTES = 2**30  # on the host at a time, beyond what the devices hold


class ArrayReader:
    """The arrays of one checkpoint."""

    def __init__(self, path: AnyPath, record: Record, *, verify: bool = True) -> None:
        self._arrays = record.arrays
        self._verify = verify
        # One context: the index of the arrays is read once, not once for each.
        self._context = ts.Context({"cache_pool#index": {"total_bytes_limit": 100_000_000}})
        place = f"{path}/state/"
        base = place if isinstance(path, BucketPath) else {"driver": "file", "path": place}
        self._base: dict[str, Any] = {
            "driver": "ocdbt",
            "base": base,
            "cache_pool": "cache_pool#index",
        }

    def read(self, name: str, box: Box) -> Array:
        """What lies in `box` of an array; [C order, dtype as saved].

        Raises DamagedError, which names the array, where that is not there or not what was saved.
        """
        saved = self._arrays[name]
        pieces = []
        if self._verify:
            parts = (part for part in saved.parts if overlap(part.box, box))
            every = itertools.chain.from_iterable(part.pieces() for part in parts)
            pieces = [(piece, crc) for piece, crc in every if overlap(piece, box)]
        # Whole pieces: only those can be checked.
        whole = hull([box, *(piece for piece, _ in pieces)])
        try:
            data = self._open(name)[slices(whole, tuple((0, 0) for _ in whole))].read().result()
        except (ValueError, LookupError, OSError, RuntimeError) as error:  # TensorStore's
            reason = f"{one_line(error)}{self._files_of(name, whole)}"
            raise DamagedError(f"array {name} cannot be read: {reason}") from None
        if data.dtype.name != saved.dtype:
            raise DamagedError(f"array {name} is {data.dtype.name}, {saved.dtype} when saved")
        for piece, crc in pieces:
            if checksum(data[slices(piece, whole)]) != crc:
                rows = f"[{piece[0][0]}:{piece[0][1]}] " if piece else ""
                raise DamagedError(f"array {name} {rows}has changed{self._files_of(name, piece)}")
        return np.asarray(data[slices(box, whole)])

    def place(self, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        """The array `name` in the dtype and sharding of `leaf`, whose shape is its own."""
        sharding = leaf.sharding
        if sharding is None:
            return jax.device_put(self.read(name, self._arrays[name].box).astype(leaf.dtype))
        boxes = {
            device: box_of(index, leaf.shape)
            for device, index in sharding.addressable_devices_indices_map(leaf.shape).items()
        }
        # Once for all devices of this process: their parts lie side by side, or are the same.
        whole = hull(list(boxes.values()))
        data = self.read(name, whole).astype(leaf.dtype, copy=False)
        kind = sharding.memory_kind
        shards = [
            jax.device_put(
                data[slices(box, whole)],
                jax.sharding.SingleDeviceSharding(device, memory_kind=kind),
                may_alias=False,  # JAX does not donate memory that NumPy holds
            )
            for device, box in boxes.items()
        ]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)

    def place_all(self, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """All arrays of `wanted`; some at a time, so that the host's memory holds them."""
        placed: dict[str, jax.Array] = {}
        with ThreadPoolExecutor(_THREADS) as threads:
            for names in self._batches(wanted):
                arrays = threads.map(lambda name: self.place(name, wanted[name]), names)
                placed |= zip(names, jax.block_until_ready(list(arrays)), strict=True)
        return placed

    def read_all(self, names: list[str]) -> dict[str, Array]:
        """Whole arrays, on the host."""
        with ThreadPoolExecutor(_THREADS) as threads:
            arrays = threads.map(lambda name: self.read(name, self._arrays[name].box), names)
            return dict(zip(names, arrays, strict=True))

    def problems(self) -> Iterator[str]:
        """What is wrong with the arrays, part by part; nothing where all are as saved."""

        def problem(item: tuple[str, Box]) -> str | None:
            try:
                self.read(*item)
            except DamagedError as error:
                return str(error)
            return None

        parts = [(name, part.box) for name, array in self._arrays.items() for part in array.parts]
        with ThreadPoolExecutor(_THREADS) as threads:
            for batch in _by_bytes(parts, [self._num_bytes(*part) for part in parts]):
                yield from (found for found in threads.map(problem, batch) if found)

    def _batches(self, wanted: dict[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
        return _by_bytes(
            list(wanted), [self._num_bytes(name, self._arrays[name].box) for name in wanted]
        )

    def _num_bytes(self, name: str, box: Box) -> int:
        return math.prod(b - a for a, b in box) * np.dtype(self._arrays[name].dtype).itemsize

    def _open(self, name: str) -> Any:  # TensorStore's classes have no types
        spec = {
            "driver": "zarr3",
            "kvstore": self._base | {"path": f"{name.replace('/', '.')}/"},
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
            "fill_missing_data_reads": False,  # no zeros in place of what is lost
        }
        return ts.open(spec, open=True, read=True, context=self._context).result()

    def _files_of(self, name: str, box: Box) -> str:
        """', in state/FILE': where the data in `box` lie, as far as that can still be told."""
        try:
            chunk = self._open(name).chunk_layout.read_chunk.shape
            ranges = (range(a // n, -(-b // n)) for (a, b), n in zip(box, chunk, strict=True))
            keys = {"/".join(("c", *map(str, place))) for place in itertools.product(*ranges)}
            base = ts.KvStore.open(self._base["base"]).result()
            versions = ts.ocdbt.dump(base).result()["versions"]
            nodes, files = [versions[-1]["root"]["location"]], set()
            while nodes:
                for entry in ts.ocdbt.dump(base, nodes.pop()).result()["entries"]:
                    array, _, key = entry["key"].decode().partition("/")
                    if "location" in entry:
                        nodes.append(entry["location"])
                    elif array == name.replace("/", ".") and key in keys:
                        # 'value:ocdbt.process_0/:d/0123:offset:length'
                        _, folder, file, *_ = entry.get("indirect_value", ":::").split(":")
                        files.add(f"{folder}{file}")
        except (ValueError, LookupError, OSError, RuntimeError):
            return ""  # the index is damaged itself
        named = [f"state/{file}" for file in sorted(files) if file]
        return f", in {' and '.join(named)}" if named else ""


def _by_bytes(items: list[Any], sizes: list[int]) -> Iterator[list[Any]]:
    """Runs of `items` of at most _BATCH_BYTES each, or of one item."""
    batch: list[Any] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if batch and total + size > _BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch
