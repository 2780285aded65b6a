"""The exact loss of a batch that is split over devices, and its gradient.

Text blocks travel round the ring of devices, a hop at a time. In the forward pass each carries
what its columns have summed up; in the backward pass the tiles are computed again, and the
block's gradient travels behind it. No device ever holds more than its own rows, two blocks and
one tile. See docs/loss.md.

Shape suffixes: b rows of one device, E embedding width.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from clip_jax.objectives.statistics import Coefficients, Outcome, finish
from clip_jax.objectives.terms import Array, Labels, Terms
from clip_jax.objectives.tiles import Block, Sides, Sweep, add, empty, sweep_block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How the batch lies on the devices and how the work is cut."""

    axis_names: tuple[str, ...]  # mesh axes of the ring; () for one device
    tile_size: int
    product_dtype: Any
    bidirectional: bool = False


def differing(*inputs: Any) -> Callable[[Any], Any]:
    """A function that marks arrays as differing over all mesh axes on which `inputs` do.

    Inside `shard_map` loop carries must keep the axes on which they differ. Adding a zero that is
    taken from the inputs says so on every version of JAX; the compiler removes it.
    """
    # A comparison, since 0 x NaN would not be zero.
    zero = jnp.int32(0)
    for x in jax.tree.leaves(inputs):
        zero += (x.ravel()[0] > 0) * 0

    def mark(x: Array) -> Array:
        return x | (zero > 0) if x.dtype == bool else x + zero.astype(x.dtype)

    return functools.partial(jax.tree.map, mark)


class Pairs(NamedTuple):
    """One device's pairs. Nothing but the embeddings, scale and bias has a gradient."""

    labels: Labels
    weights: Array | None  # float32 [b]
    num_valid: Array  # float32 scalar: pairs of the global batch with a weight above zero


class LocalSums(NamedTuple):
    """One device's share of each figure of the loss: add over devices, then divide."""

    loss: Array  # weighted, of rows and columns
    slope: Array  # d loss / d log(logit_scale)
    image_right: Array  # weighted
    text_right: Array
    positive_cosine: Array  # times the scale
    num_positives: Array
    negative_cosine: Array
    num_negatives: Array


class _Saved(NamedTuple):
    """What the backward pass needs to compute the tiles again."""

    image: Array  # [b, E]
    text: Array  # [b, E]
    scale: Array
    bias: Array | None
    labels: Labels
    rows: Coefficients
    columns: Coefficients
    diagonal: Array  # [b]


class _Gradients(NamedTuple):
    """Of the sum of all devices' losses."""

    image: Array
    text: Array
    scale: Array
    bias: Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def local_sums(
    terms: Terms,
    layout: Layout,
    image_bE: Array,
    text_bE: Array,
    scale: Array,
    bias: Array | None,
    pairs: Pairs,
) -> LocalSums:
    """This device's share of the loss over the batch of the whole ring, and of its metrics.

    Only `loss` has a gradient, and it is that of the sum over devices: the caller must add up the
    shares (psum), or each device's gradient is of something else than its output.
    """
    sweep = _sweep(terms, layout, scale, bias, with_statistics=True)
    sides = _round(sweep, layout, *_blocks(layout, image_bE, text_bE, pairs.labels))
    return _finish(terms, *sides, _own_cosines(image_bE, text_bE, scale), bias, pairs)[2]


def _forward(
    terms: Terms,
    layout: Layout,
    image_bE: Array,
    text_bE: Array,
    scale: Array,
    bias: Array | None,
    pairs: Pairs,
) -> tuple[LocalSums, _Saved | _Gradients]:
    own_cosine_b = _own_cosines(image_bE, text_bE, scale)
    # Where a logit's gradient hangs on that logit alone, one round gives loss and gradients:
    # 6 B^2 E floating-point operations in place of 8.
    if terms.kind == "sigmoid" and not terms.beta and not terms.further_positives:
        assert bias is not None
        weight_b = jnp.ones_like(own_cosine_b) if pairs.weights is None else pairs.weights
        diagonal_b = -2 * weight_b * jax.nn.sigmoid(-own_cosine_b - bias)
        saved = _Saved(
            image_bE,
            text_bE,
            scale,
            bias,
            pairs.labels,
            Coefficients(factor=weight_b),
            Coefficients(factor=weight_b),
            diagonal_b,
        )
        sides, gradients = _gradient_round(terms, layout, saved, 1.0, with_statistics=True)
        return _finish(terms, *sides, own_cosine_b, bias, pairs)[2], gradients
    sweep = _sweep(terms, layout, scale, bias, with_statistics=True)
    sides = _round(sweep, layout, *_blocks(layout, image_bE, text_bE, pairs.labels))
    image, text, sums = _finish(terms, *sides, own_cosine_b, bias, pairs)
    return sums, _Saved(
        image_bE,
        text_bE,
        scale,
        bias,
        pairs.labels,
        image.coefficients,
        text.coefficients,
        image.diagonal + text.diagonal,
    )


def _backward(
    terms: Terms, layout: Layout, saved: _Saved | _Gradients, cotangent: LocalSums
) -> tuple[Array, Array, Array, Array | None, None]:
    if isinstance(saved, _Gradients):
        return (*jax.tree.map(lambda gradient: cotangent.loss * gradient, saved), None)
    return (*_gradient_round(terms, layout, saved, cotangent.loss)[1], None)


local_sums.defvjp(_forward, _backward)


def _gradient_round(
    terms: Terms,
    layout: Layout,
    saved: _Saved,
    cotangent: Array | float,
    *,
    with_statistics: bool = False,
) -> tuple[tuple[Sides, Sides], _Gradients]:
    """The gradients, and the statistics on request, by one round of the ring."""
    # Scaled vectors, and not scaled gradients: those would be two more arrays [b, E].
    factor = cotangent * saved.scale

    def scaled(coefficients: Coefficients) -> Coefficients:
        linear = ("factor", "further_factor", "pull", "uniform")
        values = {name: getattr(coefficients, name) for name in linear}
        return coefficients._replace(
            **{name: factor * value for name, value in values.items() if value is not None}
        )

    sweep = _sweep(
        terms,
        layout,
        saved.scale,
        saved.bias,
        with_statistics=with_statistics,
        with_gradient=True,
    )
    rows, columns = _blocks(
        layout, saved.image, saved.text, saved.labels, scaled(saved.rows), scaled(saved.columns)
    )
    own_pairs = saved._replace(diagonal=factor * saved.diagonal)
    sides = _round(sweep, layout, rows, columns, own_pairs)
    row_sums, column_sums = sides
    assert row_sums.gradient is not None
    assert column_sums.gradient is not None
    # A logit is scale x cosine, so the gradient of the scale needs no product of its own.
    scale, bias = jnp.sum(saved.image * row_sums.gradient) / saved.scale, None
    if row_sums.gradient_sum is not None:
        bias = jnp.sum(row_sums.gradient_sum) / saved.scale
    return sides, _Gradients(row_sums.gradient, column_sums.gradient, scale, bias)


def _own_cosines(image_bE: Array, text_bE: Array, scale: Array) -> Array:
    return scale * jnp.sum(image_bE * text_bE, axis=-1)


def _blocks(
    layout: Layout,
    image_bE: Array,
    text_bE: Array,
    labels: Labels,
    rows: Coefficients | None = None,
    columns: Coefficients | None = None,
) -> tuple[Block, Block]:
    if _num_devices(layout) > 1:
        text_bE = text_bE.astype(layout.product_dtype)  # as it travels
    return Block(image_bE, labels, rows), Block(text_bE, labels, columns)


def _num_devices(layout: Layout) -> int:
    return math.prod(lax.axis_size(axis) for axis in layout.axis_names)


def _sweep(
    terms: Terms,
    layout: Layout,
    scale: Array,
    bias: Array | None,
    *,
    with_statistics: bool = False,
    with_gradient: bool = False,
) -> Sweep:
    return Sweep(
        terms,
        scale,
        bias,
        layout.tile_size,
        layout.product_dtype,
        with_statistics,
        with_gradient,
        differing(scale),
    )


def _finish(
    terms: Terms,
    row_sums: Sides,
    column_sums: Sides,
    own_cosine_b: Array,
    bias: Array | None,
    pairs: Pairs,
) -> tuple[Outcome, Outcome, LocalSums]:
    """The rows' and columns' parts of the loss, and this device's sums of them."""
    rows, columns = row_sums.statistics, column_sums.statistics
    assert rows is not None
    assert columns is not None
    num_negatives_b = rows.negatives.num_pairs
    if num_negatives_b is None:
        num_negatives_b = jnp.maximum(pairs.num_valid - 1, 0) * jnp.ones_like(own_cosine_b)
    num_further_b = None if rows.further is None else rows.further.num_pairs
    image, text = (
        finish(terms, statistics, own_cosine_b, bias, pairs.weights, num_negatives_b, num_further_b)
        for statistics in (rows, columns)
    )
    one_b = jnp.ones_like(own_cosine_b)
    weight_b = one_b if pairs.weights is None else pairs.weights
    valid_b = one_b if pairs.labels.valid is None else pairs.labels.valid.astype(jnp.float32)
    positive_cosine_b, num_positives_b = own_cosine_b, one_b
    if rows.further is not None and num_further_b is not None:
        assert rows.further.cosine_sum is not None
        positive_cosine_b = own_cosine_b + rows.further.cosine_sum
        num_positives_b = one_b + num_further_b
    assert rows.negatives.cosine_sum is not None
    return image, text, LocalSums(
        loss=jnp.sum(image.loss + text.loss),
        slope=jnp.sum(image.slope + text.slope),
        image_right=jnp.sum(weight_b * image.right),
        text_right=jnp.sum(weight_b * text.right),
        positive_cosine=jnp.sum(valid_b * positive_cosine_b),
        num_positives=jnp.sum(valid_b * num_positives_b),
        negative_cosine=jnp.sum(valid_b * rows.negatives.cosine_sum),
        num_negatives=jnp.sum(valid_b * num_negatives_b),
    )  # fmt: skip


def _round(
    sweep: Sweep, layout: Layout, rows: Block, columns: Block, own_pairs: _Saved | None = None
) -> tuple[Sides, Sides]:
    """The sums of all rows and columns of the ring: one visit of every block to every device.

    Each hop sends the block that was there on (while its tiles are computed) and, one hop behind,
    the sums of the block before: both transfers have a whole block of products to hide behind.
    With N devices a block makes N - 1 hops and its sums N, the last one home.
    """
    num_devices = _num_devices(layout)
    shift = _shift(layout)
    shape = rows.embeddings.shape
    row_sums = empty(sweep, *shape, is_column=False)
    column_sums = empty(sweep, *shape, is_column=True)
    if own_pairs is not None:
        # Tiles leave the own pairs out.
        own_b1 = own_pairs.diagonal[:, None]
        row_sums = row_sums._replace(gradient=own_b1 * own_pairs.text)
        column_sums = column_sums._replace(gradient=own_b1 * own_pairs.image)
        if row_sums.gradient_sum is not None:
            row_sums = row_sums._replace(gradient_sum=own_pairs.diagonal)

    def visit(block: Block, row_sums: Sides, behind: Sides) -> tuple[Sides, Sides]:
        arriving = shift(behind)
        sums = (row_sums, empty(sweep, *shape, is_column=True))
        row_sums, own = sweep_block(sweep, rows, block, sums, is_home=False)
        return row_sums, add(sweep.terms, arriving, own)

    def hop(_: Any, carry: tuple[Block, Sides, Sides]) -> tuple[Block, Sides, Sides]:
        block, row_sums, behind = carry
        return (shift(block), *visit(block, row_sums, behind))

    sums = (row_sums, column_sums)
    if num_devices == 1:
        return sweep_block(sweep, rows, columns, sums, is_home=True)
    block = shift(columns)
    row_sums, behind = sweep_block(sweep, rows, columns, sums, is_home=True)
    if num_devices > 2:
        block, row_sums, behind = lax.fori_loop(1, num_devices - 1, hop, (block, row_sums, behind))
    row_sums, behind = visit(block, row_sums, behind)
    return row_sums, shift(behind)


def _shift(layout: Layout) -> Callable[[Any], Any]:
    """A function that hands arrays on to the next device of the ring."""
    forward = ring_permutation([lax.axis_size(axis) for axis in layout.axis_names])
    backward = [(target, source) for source, target in forward]

    def one(x: Array) -> Array:
        if not layout.bidirectional:
            return lax.ppermute(x, layout.axis_names, forward)
        # Half of each block goes either way, so that both directions of every link are in use.
        half = x.shape[0] // 2
        return jnp.concatenate(
            [
                lax.ppermute(x[:half], layout.axis_names, forward),
                lax.ppermute(x[half:], layout.axis_names, backward),
            ]
        )

    return functools.partial(jax.tree.map, one)


def ring_permutation(axis_sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(source, target) pairs of one ring through a mesh of `axis_sizes`, neighbour to neighbour.

    The ring turns back at the end of each line (reflected Gray code), so every hop but the
    closing one is to a neighbour along one axis, whatever the axes' sizes.
    """
    order: list[tuple[int, ...]] = [()]
    for size in axis_sizes:
        order = [
            (*prefix, digit)
            for i, prefix in enumerate(order)
            for digit in (range(size) if i % 2 == 0 else reversed(range(size)))
        ]
    index = {place: i for i, place in enumerate(itertools.product(*map(range, axis_sizes)))}
    ring = [index[place] for place in order]
    return list(zip(ring, ring[1:] + ring[:1], strict=True))
