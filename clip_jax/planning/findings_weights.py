"""Which arrays of a program are weights, by their shapes: what else moves is activations."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from clip_jax.planning.hlo import Collective
from clip_jax.planning.hlo_arrays import dtype_bytes

if TYPE_CHECKING:
    from clip_jax.planning.compiling import ArrayInfo

Dims = tuple[int, ...]


class WeightShapes:
    """Shapes that a compiler may give the parameters: whole, split over an axis or two, a layer of
    a stack, with neighboring dims in one, in any order.

    An activation passes for a weight only where it has a weight's very dims: rows x tokens in one
    dim that is as long as the weight's.
    """

    def __init__(self, arrays: Iterable["ArrayInfo"], mesh: Mapping[str, int]) -> None:
        fsdp, tensor = mesh["fsdp"], mesh["tensor"]
        self._known: set[Dims] = set()
        for shape in {array.shape for array in arrays if array.path.startswith("params/")}:
            # Learned positions are one longer than the patches where there is a class token.
            shapes = [shape, (shape[0] - 1, *shape[1:])] if len(shape) == 2 else [shape, shape[1:]]
            for merged in (merged for one in shapes for merged in _merged(one)):
                self._known.update(_split(merged, fsdp, tensor))

    def __contains__(self, dims: Dims) -> bool:
        return _canonical(dims) in self._known

    def bytes_of_others(self, collective: Collective) -> int:
        """Of the operands of a collective that no weight looks like, in one run on one device."""
        return sum(
            math.prod(dims) * dtype_bytes(dtype)
            for dtype, dims in collective.shapes
            if dims not in self
        )


def _canonical(dims: Iterable[int]) -> Dims:
    return tuple(sorted(size for size in dims if size > 1))


def _merged(dims: Dims) -> Iterator[Dims]:
    """`dims` with any of them multiplied together: set partitions."""
    if len(dims) <= 1:
        yield dims
        return
    first, rest = dims[0], dims[1:]
    for merged in _merged(rest):
        yield (first, *merged)
        for i, size in enumerate(merged):
            yield (*merged[:i], first * size, *merged[i + 1 :])


def _split(dims: Dims, fsdp: int, tensor: int) -> Iterator[Dims]:
    """`dims`, also divided by the size of one axis in one dim, or of both in one or two."""
    for by_fsdp in _divided(dims, fsdp):
        for both in _divided(by_fsdp, tensor):
            yield _canonical(both)


def _divided(dims: Dims, parts: int) -> Iterator[Dims]:
    yield dims
    if parts == 1:
        return
    for i, size in enumerate(dims):
        if size % parts == 0:
            yield (*dims[:i], size // parts, *dims[i + 1 :])
