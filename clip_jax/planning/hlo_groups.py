"""Which devices a collective joins: the spellings of it in a program's text."""

import math
import re

import numpy as np

Groups = tuple[tuple[int, ...], ...]

_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=(\{(?:\{[\d,{} ]*\})?\})")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    r" \{([^}]*)\}"
)


def device_groups(text: str) -> Groups:
    """Groups of devices, numbered as in the mesh that the program is for.

    Of a permutation: the pairs (from, to); none where nobody sends. Raises ValueError where the
    spelling is not known.
    """
    if match := _LISTED.search(text):
        listed = re.findall(r"\{([\d,\s]+)\}", match[1])
        return tuple(_numbers(group) for group in listed)
    if match := _IOTA.search(text):
        devices = _iota(match[2], match[3]).reshape(_numbers(match[1]))
        return tuple(tuple(int(d) for d in group) for group in devices)
    if match := _MESH.search(text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", match[1])}
        devices = _iota(match[2] or str(math.prod(sizes.values())), match[3])
        return _along(devices, sizes, re.findall(r"'([^']*)'", match[4]))
    raise ValueError(f"no groups of devices in {text[-2000:]}")


def _iota(dims: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... in the shape `dims`, transposed, flat."""
    shape = _numbers(dims)
    axes = _numbers(order) if order else tuple(range(len(shape)))
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes).ravel()


def _along(devices: np.ndarray, sizes: dict[str, int], along: list[str]) -> Groups:
    """Groups of the devices of a mesh that differ in their place along some axes alone."""
    names = list(sizes)
    moved = [names.index(name) for name in along]
    rest = [i for i in range(len(names)) if i not in moved]
    grouped = devices.reshape(tuple(sizes.values())).transpose(*rest, *moved)
    grouped = grouped.reshape(-1, math.prod(sizes[name] for name in along))
    return tuple(tuple(int(d) for d in group) for group in grouped)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.replace(" ", "").split(",") if n)
