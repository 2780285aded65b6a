"""Arrays as a program's text spells them: dtype, dims, and where and how they lie in memory."""

import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = re.compile(r"\D+(\d+)")

DEVICE, ON_CHIP, HOST = 0, 1, 5  # memory spaces; others are flags and scalars


class Array(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()  # dims from the fastest to the slowest; (): not told
    tile: tuple[int, ...] = ()  # of TPUs, over the fastest dims, the slower one first
    space: int = DEVICE

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        return dtype_bytes(self.dtype) * self.size

    @property
    def padded_bytes(self) -> int:
        """As it lies in memory: TPUs fill up tiles."""
        dims = dict(enumerate(self.dims))
        for dim, tile in zip(self.order, reversed(self.tile), strict=False):
            dims[dim] = -(-dims[dim] // tile) * tile
        return dtype_bytes(self.dtype) * math.prod(dims.values())


def arrays_of(text: str) -> tuple[Array, ...]:
    """All that a type names, tuples flat, in order."""
    return tuple(_array(*match) for match in _ARRAY.findall(text))


def dtype_bytes(dtype: str) -> int:
    bits = _BITS.match(dtype)  # bf16, s32, f8e4m3fn; pred has none
    return max(1, int(bits[1]) // 8) if bits else 1


def _array(dtype: str, dims: str, layout: str) -> Array:
    order, _, rest = layout.partition(":")
    tile, space = _TILE.search(rest), _SPACE.search(rest)
    return Array(
        dtype,
        _numbers(dims),
        _numbers(order),
        _numbers(tile[1]) if tile else (),
        int(space[1]) if space else DEVICE,
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)
