"""Exact contrastive losses over a batch that is split over devices: the public entries.

Usable from any JAX code; nothing here knows a model, a config or a trainer. docs/loss.md has the
formulas, the memory and the traffic.

Shape suffixes: b rows of one device, E embedding width.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from clip_jax.objectives.dense import Metrics
from clip_jax.objectives.ring import Layout, Pairs, differing, local_sums
from clip_jax.objectives.terms import Array, Duplicates, Kind, Labels, Terms
from clip_jax.objectives.tiles import choose_tile_size


def contrastive_loss(
    image_embeddings: Array,
    text_embeddings: Array,
    logit_scale: Array | float,
    logit_bias: Array | float | None = None,
    *,
    kind: Kind,
    axis_names: str | Sequence[str] = (),
    replicated_axis_names: str | Sequence[str] = (),
    weights: Array | None = None,
    image_ids: Array | None = None,
    text_ids: Array | None = None,
    duplicates: Duplicates = "exclude",
    beta: float = 0.0,
    label_smoothing: float = 0.0,
    product_dtype: Any = jnp.float32,
    tile_size: int | None = None,
    bidirectional: bool = False,
) -> tuple[Array, Metrics]:
    """The loss over the global batch and its metrics, the same on every device.

    Call it inside `jax.shard_map` with this device's rows; without `axis_names` it needs no
    `shard_map` and the rows are the whole batch. Memory is linear in the local batch and does not
    grow with the number of devices. Differentiable (reverse mode) in embeddings, scale and bias,
    from outside `shard_map`, or inside it with `check_vma` on (the default).

    image_embeddings, text_embeddings: [b, E], unit length, row i of each is a pair. Statistics,
        loss and gradients are computed in float32 whatever their dtype.
    logit_scale: scalar multiplier, 1 / temperature, above 0; not its logarithm.
    logit_bias: scalar added to the logits. A softmax is blind to it: gradient zero.
    kind: 'softmax': InfoNCE both ways (Radford et al. 2021, fig. 3); 'sigmoid': SigLIP (Zhai et
        al. 2023, eq. 1).
    axis_names: mesh axes over which the batch is split, major first.
    replicated_axis_names: mesh axes over which the rows are repeated (a `tensor` axis): its ranks
        share the work.
    weights: [b], 0 or more: of each pair in the mean over pairs. A pair of weight 0 is padding:
        nobody's negative either.
    image_ids, text_ids: int32 [b], hashes: two pairs with an equal one are duplicates.
    duplicates: 'exclude': they are not each other's negatives; 'positive': they are each other's
        further positives. The positive part of a row is the mean over its positives.
    beta: concentration of the hardness weights of negatives, exp(beta logit) scaled to mean one
        over a row's (column's) negatives, without gradient (Robinson et al. 2021, section 4).
    label_smoothing: share of the target spread evenly over a row's candidates; softmax only.
    product_dtype: float32 or bfloat16, of the factors of the matrix products, which are summed in
        float32; with bfloat16 text blocks travel in it too.
    tile_size: rows and columns of logits held at a time; None: chosen from the shapes.
    bidirectional: half of each block travels either way round the ring.

    Returns the scalar loss and float32 scalars: image_to_text_accuracy, text_to_image_accuracy (a
    pair's best positive scores above all its negatives), positive_similarity, negative_similarity
    (mean cosines), logit_scale_gradient_norm.
    Raises ValueError at trace time for shapes, dtypes and options that do not fit.
    """
    has_ids = image_ids is not None or text_ids is not None
    terms = Terms(
        kind=kind,
        beta=beta,
        label_smoothing=label_smoothing,
        has_ids=has_ids,
        further_positives=has_ids and duplicates == "positive",
    )
    _check(image_embeddings, text_embeddings, weights, image_ids, text_ids, duplicates, tile_size)
    for name, value in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if value is not None and jnp.ndim(value):
            raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}")
    if jnp.dtype(product_dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"product_dtype {jnp.dtype(product_dtype)} is not float32 or bfloat16")
    ring_axes, replicated_axes = _names(axis_names), _names(replicated_axis_names)
    if both := set(ring_axes) & set(replicated_axes):
        raise ValueError(f"axes {sorted(both)} cannot be both split and replicated batch axes")
    image_bE = jnp.asarray(image_embeddings, jnp.float32)
    text_bE = jnp.asarray(text_embeddings, jnp.float32)
    if weights is not None:
        weights = lax.stop_gradient(jnp.asarray(weights, jnp.float32))
    rows = (image_bE, text_bE, weights, image_ids, text_ids)
    # Ranks that hold the same rows become further places of the ring, each with a part of them.
    image_bE, text_bE, weights, image_ids, text_ids = _own_share(rows, replicated_axes)
    axes = ring_axes + replicated_axes
    scale, bias = jnp.asarray(logit_scale, jnp.float32), None
    plain_scale = lax.stop_gradient(scale)
    if kind == "sigmoid":
        bias = jnp.asarray(0.0 if logit_bias is None else logit_bias, jnp.float32)

    def total(x: Any) -> Any:
        return lax.psum(x, axes) if axes else x

    labels = Labels(image_ids, text_ids, None if weights is None else weights > 0)
    inputs = (image_bE, text_bE, scale, bias, labels, weights, jnp.float32(image_bE.shape[0]))
    # Of one kind for the ring: what differs over some axes makes all of it do so.
    inputs = differing(inputs, lax.axis_index(axes) if axes else ())(inputs)
    image_bE, text_bE, scale, bias, labels, weights, num_pairs = inputs
    num_valid = total(num_pairs if labels.valid is None else labels.valid.sum(dtype=jnp.float32))
    layout = Layout(
        axis_names=axes,
        tile_size=tile_size or choose_tile_size(*image_bE.shape),
        product_dtype=jnp.dtype(product_dtype),
        bidirectional=bidirectional,
    )
    num_valid = differing(image_bE)(num_valid)
    pairs = Pairs(labels, weights, num_valid)
    sums = local_sums(terms, layout, image_bE, text_bE, scale, bias, pairs)
    # An all-padding batch has loss 0, not 0 / 0.
    weight_sum = total(num_pairs if weights is None else weights.sum())
    num_terms = jnp.where(weight_sum == 0, 1.0, weight_sum)
    loss = total(sums.loss) / (2 * num_terms)
    sums = lax.stop_gradient(total(sums))
    scaled_positives, scaled_negatives = (
        plain_scale * jnp.maximum(number, 1) for number in (sums.num_positives, sums.num_negatives)
    )
    return loss, {
        "image_to_text_accuracy": sums.image_right / num_terms,
        "text_to_image_accuracy": sums.text_right / num_terms,
        "positive_similarity": sums.positive_cosine / scaled_positives,
        "negative_similarity": sums.negative_cosine / scaled_negatives,
        "logit_scale_gradient_norm": jnp.abs(sums.slope) / (2 * num_terms * plain_scale),
    }


def softmax_contrastive_loss(
    image_embeddings: Array, text_embeddings: Array, logit_scale: Array | float, **options: Any
) -> tuple[Array, Metrics]:
    """`contrastive_loss` with kind 'softmax' (CLIP, Radford et al. 2021, fig. 3)."""
    return contrastive_loss(
        image_embeddings, text_embeddings, logit_scale, kind="softmax", **options
    )


def sigmoid_contrastive_loss(
    image_embeddings: Array,
    text_embeddings: Array,
    logit_scale: Array | float,
    logit_bias: Array | float,
    **options: Any,
) -> tuple[Array, Metrics]:
    """`contrastive_loss` with kind 'sigmoid' (SigLIP, Zhai et al. 2023, eq. 1)."""
    return contrastive_loss(
        image_embeddings, text_embeddings, logit_scale, logit_bias, kind="sigmoid", **options
    )


def _names(axis_names: str | Sequence[str]) -> tuple[str, ...]:
    return (axis_names,) if isinstance(axis_names, str) else tuple(axis_names)


def _own_share(rows: Any, axes: tuple[str, ...]) -> Any:
    """This rank's part of rows that all ranks of `axes` hold."""
    ranks = 1
    for axis in axes:
        ranks *= lax.axis_size(axis)
    if ranks == 1:
        return rows
    num_rows = rows[0].shape[0]
    if num_rows % ranks:
        raise ValueError(
            f"{num_rows} pairs per device are not divisible by the {ranks} ranks of "
            f"replicated_axis_names {axes}; use a batch that is, or leave the axes out"
        )
    share = num_rows // ranks
    start = lax.axis_index(axes) * share
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, share), rows)


def _check(
    image_bE: Array,
    text_bE: Array,
    weights: Array | None,
    image_ids: Array | None,
    text_ids: Array | None,
    duplicates: str,
    tile_size: int | None,
) -> None:
    if image_bE.ndim != 2 or image_bE.shape != text_bE.shape or not image_bE.size:
        raise ValueError(
            "image_embeddings and text_embeddings must have one shape [pairs, width], got "
            f"{image_bE.shape} and {text_bE.shape}"
        )
    num_rows = image_bE.shape[0]
    for name, values in (("image_ids", image_ids), ("text_ids", text_ids), ("weights", weights)):
        if values is not None and values.shape != (num_rows,):
            raise ValueError(
                f"{name} must have shape ({num_rows},), one per pair, got {values.shape}"
            )
    for name, ids in (("image_ids", image_ids), ("text_ids", text_ids)):
        if ids is not None and ids.dtype != jnp.int32:
            raise ValueError(f"{name} must be int32 hashes, got {ids.dtype}")
    if duplicates not in ("exclude", "positive"):
        raise ValueError(f"duplicates {duplicates!r} is not 'exclude' or 'positive'")
    if duplicates == "positive" and image_ids is None and text_ids is None:
        raise ValueError("duplicates 'positive' needs image_ids or text_ids")
    if tile_size is not None and tile_size < 1:
        raise ValueError(f"tile_size {tile_size} must be positive")
