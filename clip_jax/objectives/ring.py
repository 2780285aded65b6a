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
    rows, columns = _blocks(layout, image_bE, text_bE, pairs.labels)
    sides = _round(sweep, layout, rows, columns)
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
    # Where a logit's gradient hangs on that logit alone, one round gives loss and gradients:
    # 6 B^2 E floating-point operations in place of 8.
    one_round = terms.kind == "sigmoid" and not terms.beta and not terms.further_positives
    coefficients = None
    if one_round:
        weight_b = pairs.weights
        if weight_b is None:
            weight_b = differing(scale)(jnp.ones(image_bE.shape[0], jnp.float32))
        coefficients = Coefficients(factor=weight_b)
    sweep = _sweep(terms, layout, scale, bias, with_statistics=True, with_gradient=one_round)
    rows, columns = _blocks(layout, image_bE, text_bE, pairs.labels, coefficients, coefficients)
    sides = _round(sweep, layout, rows, columns)
    own_cosine_b = _own_cosines(image_bE, text_bE, scale)
    image, text, sums = _finish(terms, *sides, own_cosine_b, bias, pairs)
    saved = _Saved(
        image_bE,
        text_bE,
        scale,
        bias,
        pairs.labels,
        image.coefficients,
        text.coefficients,
        image.diagonal + text.diagonal,
    )
    return sums, _gradients(saved, *sides) if one_round else saved


def _backward(
    terms: Terms, layout: Layout, saved: _Saved | _Gradients, cotangent: LocalSums
) -> tuple[Array, Array, Array, Array | None, None]:
    if isinstance(saved, _Saved):
        sweep = _sweep(terms, layout, saved.scale, saved.bias, with_gradient=True)
        rows, columns = _blocks(
            layout, saved.image, saved.text, saved.labels, saved.rows, saved.columns
        )
        gradients = _gradients(saved, *_round(sweep, layout, rows, columns))
    else:
        gradients = saved
    scaled = jax.tree.map(lambda gradient: cotangent.loss * gradient, gradients)
    return (*scaled, None)


local_sums.defvjp(_forward, _backward)


def _gradients(saved: _Saved, row_sums: Sides, column_sums: Sides) -> _Gradients:
    """From the sums over tiles, and the own pairs that tiles leave out."""
    assert row_sums.gradient is not None
    assert column_sums.gradient is not None
    diagonal_b1 = saved.diagonal[:, None]
    image_bE = row_sums.gradient + diagonal_b1 * saved.text
    text_bE = column_sums.gradient + diagonal_b1 * saved.image
    bias = None
    if row_sums.gradient_sum is not None:
        bias = jnp.sum(row_sums.gradient_sum + saved.diagonal)
    # A logit is scale x cosine, so the gradient of the scale needs no product of its own.
    scale = jnp.sum(saved.image * image_bE)
    return _Gradients(saved.scale * image_bE, saved.scale * text_bE, scale, bias)


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
    dtype = layout.product_dtype
    return (
        Block(image_bE.astype(dtype), labels, rows),
        Block(text_bE.astype(dtype), labels, columns),
    )


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
        terms, scale, bias, layout.tile_size, with_statistics, with_gradient, differing(scale)
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


def _round(sweep: Sweep, layout: Layout, rows: Block, columns: Block) -> tuple[Sides, Sides]:
    """The sums of all rows and columns of the ring: one visit of every block to every device.

    Each hop sends the block that was there on (while its tiles are computed) and, one hop behind,
    the sums of the block before: both transfers have a whole block of products to hide behind.
    With N devices a block makes N - 1 hops and its sums N, the last one home.
    """
    num_devices = math.prod(lax.axis_size(axis) for axis in layout.axis_names)
    shift = _shift(layout)
    row_sums = empty(sweep, *rows.embeddings.shape, is_column=False)

    def hop(_: Any, carry: tuple[Block, Sides, Sides]) -> tuple[Block, Sides, Sides]:
        block, row_sums, behind = carry
        following, arriving = shift(block), shift(behind)
        row_sums, own = sweep_block(sweep, rows, block, row_sums, is_home=False)
        return following, row_sums, add(sweep.terms, arriving, own)

    if num_devices == 1:
        return sweep_block(sweep, rows, columns, row_sums, is_home=True)
    block = shift(columns)
    row_sums, behind = sweep_block(sweep, rows, columns, row_sums, is_home=True)
    if num_devices > 2:
        block, row_sums, behind = lax.fori_loop(1, num_devices - 1, hop, (block, row_sums, behind))
    arriving = shift(behind)
    row_sums, own = sweep_block(sweep, rows, block, row_sums, is_home=False)
    return row_sums, shift(add(sweep.terms, arriving, own))


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
