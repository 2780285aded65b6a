"""One device's rows against one block of text columns, a tile of logits at a time.

Shape suffixes: b rows of one device, E embedding width, I image rows of a tile, J text rows of a
tile. Only one tile [I, J] exists at any time.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from clip_jax.objectives.statistics import (
    Coefficients,
    Statistics,
    merge,
    nothing,
    summarize,
    tile_gradient,
)
from clip_jax.objectives.terms import Array, Labels, Terms, part

# Below 512 a tile's product is too small to pay for the loop; above 4096 nothing is gained, since
# a tile's own traffic (its logits) outweighs that of the embeddings it reads.
_SMALLEST, _LARGEST = 512, 4096


class Block(NamedTuple):
    """Rows of one tower with all that a tile needs to know of them."""

    embeddings: Array  # [b, E]; a tile's part is cast to the dtype of the products
    labels: Labels
    coefficients: Coefficients | None = None  # None: the gradient is not asked for


class Sides(NamedTuple):
    """What a sweep adds up for the rows, or for the columns. None: not asked for."""

    statistics: Statistics | None = None
    gradient: Array | None = None  # [b, E] float32: sum of logit gradients x the other embeddings
    gradient_sum: Array | None = None  # [b]: sum of logit gradients


class Sweep(NamedTuple):
    """How tiles are computed: what a forward and a backward pass share."""

    terms: Terms
    scale: Array
    bias: Array | None
    tile_size: int
    product_dtype: Any
    with_statistics: bool
    with_gradient: bool
    vary: Callable[[Any], Any]  # marks fresh arrays as differing between devices


def choose_tile_size(num_rows: int, embed_dim: int) -> int:
    """Side of the square tiles for a device's `num_rows` pairs.

    A tile takes at most half the memory of one tower's local embeddings (float32 both), so the
    whole stays linear in the local batch. A side that divides the rows and fills the lanes of a
    TPU (128) comes first. Else tiles are of equal size, a multiple of 8; the rows that the last
    one shares with its neighbour, fewer than 8 per tile, are computed twice.
    """
    at_most = min(max(math.isqrt(num_rows * embed_dim // 2), _SMALLEST), _LARGEST)
    if num_rows <= at_most:
        return num_rows
    for size in range(at_most - at_most % 128, at_most // 2, -128):
        if num_rows % size == 0:
            return size
    even = -(-num_rows // -(-num_rows // at_most))
    return min(num_rows, -(-even // 8) * 8)


def empty(sweep: Sweep, num_rows: int, embed_dim: int, *, is_column: bool) -> Sides:
    """The sums before the first tile."""
    statistics = gradient = gradient_sum = None
    if sweep.with_statistics:
        statistics = nothing(sweep.terms, num_rows, is_column=is_column)
    if sweep.with_gradient:
        gradient = jnp.zeros((num_rows, embed_dim), jnp.float32)
        if sweep.bias is not None and not is_column:
            gradient_sum = jnp.zeros(num_rows, jnp.float32)
    return sweep.vary(Sides(statistics, gradient, gradient_sum))


def add(terms: Terms, first: Sides, second: Sides) -> Sides:
    """The sums over the tiles of both."""
    statistics = first.statistics
    if first.statistics is not None and second.statistics is not None:
        statistics = merge(terms, first.statistics, second.statistics)
    rest = jax.tree.map(jnp.add, first._replace(statistics=None), second._replace(statistics=None))
    return rest._replace(statistics=statistics)


def sweep_block(
    sweep: Sweep, rows: Block, columns: Block, sums: tuple[Sides, Sides], *, is_home: bool
) -> tuple[Sides, Sides]:
    """Adds all tiles of rows x columns to `sums` of the rows and of the columns.

    is_home: row i and column i are a pair. Its logit is left out: the caller has it already.
    """
    num_rows = rows.embeddings.shape[0]
    size = min(sweep.tile_size, num_rows)
    num_tiles = -(-num_rows // size)
    overlaps = num_tiles * size != num_rows

    def first_row(tile: Array | int) -> Array | int:
        # The last tile is moved back to end with the block; what it sees twice is masked.
        return jnp.minimum(tile * size, num_rows - size) if overlaps else tile * size

    def taking_part(row_tile: Array | int, column_tile: Array | int) -> Array | None:
        row_I = first_row(row_tile) + lax.broadcasted_iota(jnp.int32, (size, size), 0)
        column_J = first_row(column_tile) + lax.broadcasted_iota(jnp.int32, (size, size), 1)
        present = (row_I != column_J) if is_home else None
        if overlaps:
            fresh = (row_I >= row_tile * size) & (column_J >= column_tile * size)
            present = fresh if present is None else present & fresh
        return present

    def one_tile(
        row_tile: Array | int, column_tile: Array | int, row_I: Block, sums_I: Sides, sums_b: Sides
    ) -> tuple[Sides, Sides]:
        start = first_row(column_tile)
        column_J = _slice(columns, start, size)
        added_I, added_J = _tile(sweep, row_I, column_J, taking_part(row_tile, column_tile))
        sums_J = add(sweep.terms, _slice(sums_b, start, size), added_J)
        return add(sweep.terms, sums_I, added_I), _update(sums_b, sums_J, start)

    def one_row_of_tiles(row_tile: Array | int, sums: tuple[Sides, Sides]) -> tuple[Sides, Sides]:
        row_sums, column_sums = sums
        start = first_row(row_tile)
        row_I = _slice(rows, start, size)
        sums_I, column_sums = _loop(
            num_tiles,
            lambda column_tile, carry: one_tile(row_tile, column_tile, row_I, *carry),
            (_slice(row_sums, start, size), column_sums),
        )
        return _update(row_sums, sums_I, start), column_sums

    return _loop(num_tiles, one_row_of_tiles, sums)


def _tile(
    sweep: Sweep, row_I: Block, column_J: Block, taking_part_IJ: Array | None
) -> tuple[Sides, Sides]:
    """What one tile adds to its rows and to its columns."""
    terms = sweep.terms
    # Cast a tile at a time: a copy of all rows would outweigh everything else on one device.
    image_IE = row_I.embeddings.astype(sweep.product_dtype)
    text_JE = column_J.embeddings.astype(sweep.product_dtype)
    cosine_IJ = product(image_IE, text_JE, contract=(1, 1))
    tile = part(
        terms, sweep.scale * cosine_IJ, sweep.bias, row_I.labels, column_J.labels, taking_part_IJ
    )
    row_sums, column_sums = Sides(), Sides()
    if sweep.with_statistics:
        row_sums = row_sums._replace(statistics=summarize(terms, tile, is_column=False))
        column_sums = column_sums._replace(statistics=summarize(terms, tile, is_column=True))
    if sweep.with_gradient:
        assert row_I.coefficients is not None
        assert column_J.coefficients is not None
        gradient_IJ = tile_gradient(terms, tile, row_I.coefficients, column_J.coefficients)
        if sweep.bias is not None:
            row_sums = row_sums._replace(gradient_sum=gradient_IJ.sum(1))
        gradient_IJ = gradient_IJ.astype(image_IE.dtype)
        row_sums = row_sums._replace(gradient=product(gradient_IJ, text_JE, contract=(1, 0)))
        column_sums = column_sums._replace(gradient=product(gradient_IJ, image_IE, contract=(0, 0)))
    return row_sums, column_sums


def product(left: Array, right: Array, *, contract: tuple[int, int]) -> Array:
    """Matrix product over one dim of each, summed in float32."""
    # GPUs and TPUs round float32 products to fewer bits by default; the exact loss keeps them all.
    exact = left.dtype == jnp.float32
    return lax.dot_general(
        left,
        right,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def _loop(count: int, body: Callable[..., Any], carry: Any) -> Any:
    return body(0, carry) if count == 1 else lax.fori_loop(0, count, body, carry)


def _slice(tree: Any, start: Array | int, size: int) -> Any:
    def one(x: Array) -> Array:
        return x if x.shape[0] == size else lax.dynamic_slice_in_dim(x, start, size)

    return jax.tree.map(one, tree)


def _update(tree: Any, rows: Any, start: Array | int) -> Any:
    def one(x: Array, x_I: Array) -> Array:
        if x.shape == x_I.shape:
            return x_I
        return lax.dynamic_update_slice_in_dim(x, x_I, start, axis=0)

    return jax.tree.map(one, tree, rows)
