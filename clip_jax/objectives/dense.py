"""The contrastive losses as in the textbook, with all logits at once: the oracle of the ring.

Written for reading and for float64, not for speed: B x B arrays everywhere.

Shape suffixes: B batch, E embedding width, I image rows, J text rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from clip_jax.objectives.terms import Array, Duplicates, Terms

Metrics = dict[str, Array]
_RowLoss = Callable[[Array, Array, Array], Array]


def dense_softmax_contrastive_loss(
    image_BE: Array,
    text_BE: Array,
    logit_scale: Array | float,
    logit_bias: Array | float | None = None,
    *,
    weights: Array | None = None,
    image_ids: Array | None = None,
    text_ids: Array | None = None,
    duplicates: Duplicates = "exclude",
    beta: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Array, Metrics]:
    """Mean of image-to-text and text-to-image cross entropy (CLIP, Radford et al. 2021, fig. 3).

    The arguments and the result are those of `contrastive_loss`, with the whole batch in one
    place. `logit_bias` changes nothing: a softmax is blind to it.
    """
    del logit_bias
    terms = Terms(kind="softmax", beta=beta, label_smoothing=label_smoothing)

    def row_loss(logits_IJ: Array, positive_IJ: Array, negative_IJ: Array) -> Array:
        hardness_IJ = _hardness(logits_IJ, negative_IJ, terms.beta)
        weighted_IJ = jnp.where(negative_IJ, logits_IJ + jnp.log(hardness_IJ), -jnp.inf)
        candidates_IJ = jnp.where(positive_IJ, logits_IJ, weighted_IJ)
        log_norm_I1 = jax.nn.logsumexp(candidates_IJ, axis=1, keepdims=True)
        log_probability_IJ = logits_IJ - log_norm_I1
        candidate_IJ = positive_IJ | negative_IJ
        target_IJ = (1 - terms.label_smoothing) * positive_IJ / positive_IJ.sum(1, keepdims=True)
        target_IJ += terms.label_smoothing * candidate_IJ / candidate_IJ.sum(1, keepdims=True)
        return -jnp.sum(jnp.where(candidate_IJ, target_IJ * log_probability_IJ, 0), axis=1)

    return _dense(
        row_loss, image_BE, text_BE, logit_scale, 0.0, weights, image_ids, text_ids, duplicates
    )


def dense_sigmoid_contrastive_loss(
    image_BE: Array,
    text_BE: Array,
    logit_scale: Array | float,
    logit_bias: Array | float | None = None,
    *,
    weights: Array | None = None,
    image_ids: Array | None = None,
    text_ids: Array | None = None,
    duplicates: Duplicates = "exclude",
    beta: float = 0.0,
) -> tuple[Array, Metrics]:
    """Each pair of image and text as a yes-or-no question (SigLIP, Zhai et al. 2023, eq. 1).

    The arguments and the result are those of `contrastive_loss`, with the whole batch in one
    place.
    """
    terms = Terms(kind="sigmoid", beta=beta)

    def row_loss(logits_IJ: Array, positive_IJ: Array, negative_IJ: Array) -> Array:
        hardness_IJ = _hardness(logits_IJ, negative_IJ, terms.beta)
        no_IJ = jnp.where(negative_IJ, -hardness_IJ * jax.nn.log_sigmoid(-logits_IJ), 0)
        yes_IJ = jnp.where(positive_IJ, -jax.nn.log_sigmoid(logits_IJ), 0)
        return no_IJ.sum(1) + yes_IJ.sum(1) / positive_IJ.sum(1)

    bias = 0.0 if logit_bias is None else logit_bias
    return _dense(
        row_loss, image_BE, text_BE, logit_scale, bias, weights, image_ids, text_ids, duplicates
    )


def _hardness(logits_IJ: Array, negative_IJ: Array, beta: float) -> Array:
    """Weights exp(beta l) of the negatives, of mean one in each row (Robinson et al. 2021)."""
    if beta == 0:
        return jnp.ones_like(logits_IJ)
    logits_IJ = jnp.where(negative_IJ, jax.lax.stop_gradient(logits_IJ), -jnp.inf)
    # A row without negatives has no weights to normalise; its softmax would be NaN.
    share_IJ = jnp.where(negative_IJ, jax.nn.softmax(beta * logits_IJ, axis=1), 1.0)
    return share_IJ * jnp.where(negative_IJ, negative_IJ.sum(1, keepdims=True), 1)


def _dense(
    row_loss: _RowLoss,
    image_BE: Array,
    text_BE: Array,
    logit_scale: Array | float,
    logit_bias: Array | float,
    weights: Array | None,
    image_ids: Array | None,
    text_ids: Array | None,
    duplicates: Duplicates,
) -> tuple[Array, Metrics]:
    own_IJ = jnp.eye(image_BE.shape[0], dtype=bool)
    weight_B = jnp.ones(image_BE.shape[0], image_BE.dtype) if weights is None else weights
    weight_sum = jnp.where(jnp.any(weight_B), weight_B.sum(), 1)  # all padding: 0, not 0 / 0
    present_IJ = (weight_B[:, None] > 0) & (weight_B[None, :] > 0)
    duplicate_IJ = jnp.zeros_like(own_IJ)
    for ids_B in (image_ids, text_ids):
        if ids_B is not None:
            duplicate_IJ |= ids_B[:, None] == ids_B[None, :]
    further_IJ = duplicate_IJ & present_IJ & ~own_IJ & (duplicates == "positive")
    positive_IJ = own_IJ | further_IJ  # a row always has its own pair, whatever its weight
    negative_IJ = present_IJ & ~duplicate_IJ & ~own_IJ

    def loss_of(logits_IJ: Array) -> Array:
        image_to_text_B = row_loss(logits_IJ, positive_IJ, negative_IJ)
        text_to_image_B = row_loss(logits_IJ.T, positive_IJ.T, negative_IJ.T)
        total = jnp.sum(weight_B * (image_to_text_B + text_to_image_B))
        return 0.5 * total / weight_sum

    # GPUs and TPUs round float32 products to fewer bits by default; the loss keeps them all.
    cosine_IJ = jnp.matmul(image_BE, text_BE.T, precision=jax.lax.Precision.HIGHEST)
    loss = loss_of(logit_scale * cosine_IJ + logit_bias)

    cosine_IJ = jax.lax.stop_gradient(cosine_IJ)
    scale = jax.lax.stop_gradient(jnp.asarray(logit_scale, cosine_IJ.dtype))
    slope = jax.grad(lambda s: loss_of(s * cosine_IJ + jax.lax.stop_gradient(logit_bias)))(scale)

    def accuracy(cosine_IJ: Array) -> Array:
        best_positive_I = jnp.max(jnp.where(positive_IJ, cosine_IJ, -jnp.inf), axis=1)
        best_negative_I = jnp.max(jnp.where(negative_IJ, cosine_IJ, -jnp.inf), axis=1)
        return jnp.sum(weight_B * (best_positive_I > best_negative_I)) / weight_sum

    def mean(mask_IJ: Array) -> Array:
        return jnp.sum(jnp.where(mask_IJ, cosine_IJ, 0)) / jnp.maximum(mask_IJ.sum(), 1)

    return loss, {
        "image_to_text_accuracy": accuracy(cosine_IJ),
        "text_to_image_accuracy": accuracy(cosine_IJ.T),
        "positive_similarity": mean(positive_IJ & present_IJ),
        "negative_similarity": mean(negative_IJ),
        "logit_scale_gradient_norm": jnp.abs(slope),
    }
