"""Two-way tables of tensor names: one table per family serves import and export alike.

A table is a list of rows; each says how one array of ours lies in the tensors of a foreign format.
Reading consumes every tensor and writing makes every tensor, or an error names the odd one.
Layers, which we stack on a leading axis, are spelled `{layer}` in foreign names.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from clip_jax.config import UserError

_log = logging.getLogger(__name__)

NdArray = NDArray[np.generic]
Shape = tuple[int, ...]

_FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One array of ours and the foreign tensors that hold the same numbers.

    ours: its path, 'image/blocks/mlp/up/kernel'. theirs: one name, or several where one array of
    ours is split there; all with `{layer}` where ours is stacked. write: our array (of one layer)
    to their tensors, in the order of `theirs`. read: the way back; the result is reshaped to ours.
    Both only move numbers (transpose, reshape, split), so that a round trip keeps every byte.
    """

    ours: str
    theirs: tuple[str, ...]
    write: Callable[[NdArray], Sequence[NdArray]] = lambda array: [array]
    read: Callable[[Sequence[NdArray]], NdArray] = lambda tensors: tensors[0]

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.theirs[0]

    def names(self, layer: int) -> list[str]:
        return [name.replace("{layer}", str(layer)) for name in self.theirs]


# ---- Rows ------------------------------------------------------------------------------------


def same(ours: str, theirs: str, *, shape: Shape | None = None) -> Row:
    """The same numbers in the same order; `shape`: theirs, where it differs, with one -1."""
    return Row(ours=ours, theirs=(theirs,), write=lambda array: [_reshaped(array, shape)])


def transposed(ours: str, theirs: str) -> Row:
    """Our kernel [in, ...] as their matrix [out, in]."""
    return Row(
        ours=ours,
        theirs=(theirs,),
        write=lambda array: [array.reshape(array.shape[0], -1).T],
        read=lambda tensors: tensors[0].T,
    )


def linear(ours: str, theirs: str, *, bias: bool = True) -> list[Row]:
    """kernel [in, out] and bias as a torch Linear: weight [out, in], bias."""
    rows = [transposed(f"{ours}/kernel", f"{theirs}.weight")]
    return [*rows, same(f"{ours}/bias", f"{theirs}.bias", shape=(-1,))] if bias else rows


def norm(ours: str, theirs: str) -> list[Row]:
    """scale and bias as a torch norm layer's weight and bias."""
    return [same(f"{ours}/scale", f"{theirs}.weight"), same(f"{ours}/bias", f"{theirs}.bias")]


def attention_out(ours: str, theirs: str) -> list[Row]:
    """kernel [N, H, D] and bias as a torch Linear: weight [D, N H], bias."""
    kernel = Row(
        ours=f"{ours}/kernel",
        theirs=(f"{theirs}.weight",),
        write=lambda array: [array.reshape(-1, array.shape[-1]).T],
        read=lambda tensors: tensors[0].T,
    )
    return [kernel, same(f"{ours}/bias", f"{theirs}.bias")]


def split_projections(ours: str, theirs: Sequence[str]) -> list[Row]:
    """kernel [D, K, N, H] and bias [K, N, H] as K torch Linears (q, k, v), each [N H, D]."""
    kernel = Row(
        ours=f"{ours}/kernel",
        theirs=tuple(f"{name}.weight" for name in theirs),
        write=lambda array: [
            array[:, i].reshape(array.shape[0], -1).T for i in range(array.shape[1])
        ],
        read=lambda tensors: np.stack([tensor.T for tensor in tensors], axis=1),
    )
    bias = Row(
        ours=f"{ours}/bias",
        theirs=tuple(f"{name}.bias" for name in theirs),
        write=lambda array: [part.reshape(-1) for part in array],
        read=np.stack,
    )
    return [kernel, bias]


def fused_projection(ours: str, weight: str, bias: str) -> list[Row]:
    """kernel [D, K, N, H] and bias [K, N, H] as one matrix [K N H, D] and vector [K N H]."""
    return [transposed(f"{ours}/kernel", weight), same(f"{ours}/bias", bias, shape=(-1,))]


def convolution(ours: str, theirs: str) -> Row:
    """kernel [rows, columns, in, out] as a torch Conv2d's weight [out, in, rows, columns]."""
    return Row(
        ours=ours,
        theirs=(theirs,),
        write=lambda array: [array.transpose(3, 2, 0, 1)],
        read=lambda tensors: tensors[0].transpose(2, 3, 1, 0),
    )


def patch_convolution(ours: str, theirs: str, *, patch_size: int) -> Row:
    """kernel [rows x columns x 3, D] as a torch Conv2d's weight [D, 3, rows, columns]."""
    grid = (patch_size, patch_size, 3, -1)
    return Row(
        ours=ours,
        theirs=(theirs,),
        write=lambda array: [array.reshape(grid).transpose(3, 2, 0, 1)],
        read=lambda tensors: tensors[0].transpose(2, 3, 1, 0),
    )


# ---- Tables ----------------------------------------------------------------------------------


def read_table(
    rows: Sequence[Row],
    tensors: Mapping[str, NdArray],
    shapes: Mapping[str, Shape],
    *,
    ignored: Iterable[str] = (),
) -> dict[str, NdArray]:
    """Our arrays by path, in the dtypes that the tensors have (of several, the widest).

    shapes: of all our arrays. ignored: patterns (full match) of foreign names that hold no weights,
    as buffers. Raises UserError that names the first tensor that is missing, of another shape, not
    finite, or not in the table.
    """
    _check_complete(rows, shapes)
    patterns = [re.compile(pattern) for pattern in ignored]
    used: set[str] = set()
    result = {}
    for row in rows:
        shape = shapes[row.ours]
        part = shape[1:] if row.stacked else shape
        expected = [tensor.shape for tensor in row.write(_nothing(part))]
        found = []
        for layer in range(shape[0] if row.stacked else 1):
            taken = []
            for name, theirs in zip(row.names(layer), expected, strict=True):
                taken.append(_checked(name, tensors, theirs))
                used.add(name)
            found.append(taken)
        layers = [row.read(taken).reshape(part) for taken in _in_one_dtype(row.ours, found)]
        result[row.ours] = np.stack(layers) if row.stacked else layers[0]
    extra = [
        name
        for name in tensors
        if name not in used and not any(pattern.fullmatch(name) for pattern in patterns)
    ]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(f"the weights hold {extra[0]!r}{more}, which the model has no place for")
    return result


def write_table(rows: Sequence[Row], params: Mapping[str, NdArray]) -> dict[str, NdArray]:
    """Foreign tensors by name, contiguous, in the dtypes of `params` (our arrays by path)."""
    _check_complete(rows, {path: array.shape for path, array in params.items()})
    tensors: dict[str, NdArray] = {}
    for row in rows:
        array = params[row.ours]
        for layer, part in enumerate(array if row.stacked else [array]):
            for name, tensor in zip(row.names(layer), row.write(part), strict=True):
                assert name not in tensors, f"two rows write {name}"
                tensors[name] = np.array(tensor, order="C")  # no views: files share no memory
    return tensors


def _in_one_dtype(ours: str, taken: list[list[NdArray]]) -> list[list[NdArray]]:
    """The tensors of one array of ours: the widest type holds all values, as an array has one."""
    dtypes = {tensor.dtype for layer in taken for tensor in layer}
    if len(dtypes) == 1:
        return taken
    # float32 for float16 beside bfloat16, too: neither holds the other.
    widest = np.float64 if np.dtype(np.float64) in dtypes else np.float32
    spelled = " and ".join(sorted(dtype.name for dtype in dtypes))
    _log.warning(
        "tensors of %s are of %s: all become %s, and leave as that", ours, spelled, widest.__name__
    )
    return [[tensor.astype(widest) for tensor in layer] for layer in taken]


def _checked(name: str, tensors: Mapping[str, NdArray], shape: Shape) -> NdArray:
    if name not in tensors:
        raise UserError(f"the weights lack {name!r}, which the model needs with shape {shape}")
    tensor = tensors[name]
    if tensor.shape != shape:
        raise UserError(
            f"the weights' {name!r} has shape {tensor.shape}, but the model needs {shape}"
        )
    if tensor.dtype.name not in _FLOATS:
        raise UserError(
            f"the weights' {name!r} is of type {tensor.dtype}, but must be of {', '.join(_FLOATS)}"
        )
    # One pass without a mask of the array's size: a sum is finite if all are (or overflows, which
    # the slow check then tells apart).
    values = tensor.astype(np.float32, copy=False)
    with np.errstate(invalid="ignore"):  # infinities of both signs
        total = float(values.sum(dtype=np.float64))
    if not math.isfinite(total) and not np.isfinite(values).all():
        raise UserError(f"the weights' {name!r} has values that are not finite (NaN or infinity)")
    return tensor


def _check_complete(rows: Sequence[Row], shapes: Mapping[str, Shape]) -> None:
    paths = [row.ours for row in rows]
    assert len(set(paths)) == len(paths), "two rows for one array"
    odd = set(paths) ^ set(shapes)
    assert not odd, f"the table and the model differ in {sorted(odd)}"


def _nothing(shape: Shape) -> NdArray:
    """An array of zeros that takes no memory."""
    return np.broadcast_to(np.zeros((), np.int8), shape)


def _reshaped(array: NdArray, shape: Shape | None) -> NdArray:
    return array if shape is None else array.reshape(shape)
