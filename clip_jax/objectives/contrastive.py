"""Contrastive losses on unit-length embeddings: the textbook form and the sharded one.

Shape suffixes: B global batch, b rows of one device, E embedding width, I image rows, J text rows.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array
Metrics = dict[str, Array]


def _cosines(query_BE: Array, key_BE: Array) -> Array:
    # GPUs and TPUs round float32 products to fewer bits by default; the loss keeps them all.
    return jnp.matmul(query_BE, key_BE.T, precision=jax.lax.Precision.HIGHEST)


def dense_softmax_contrastive_loss(
    image_BE: Array, text_BE: Array, logit_scale: Array | float
) -> tuple[Array, Metrics]:
    """Mean of image-to-text and text-to-image cross entropy (CLIP, Radford et al. 2021, fig. 3).

    image_BE, text_BE: unit-length float32 embeddings, row i of each is a pair.
    logit_scale: scalar multiplier, 1 / temperature.
    Returns the scalar loss, and the in-batch accuracies: the oracle of the sharded form.
    """
    logits_IJ = logit_scale * _cosines(image_BE, text_BE)
    positive_B = jnp.diagonal(logits_IJ)
    image_to_text_B = jax.nn.logsumexp(logits_IJ, axis=1) - positive_B
    text_to_image_B = jax.nn.logsumexp(logits_IJ, axis=0) - positive_B
    row_B = jnp.arange(image_BE.shape[0])
    metrics = {
        "image_to_text_accuracy": jnp.mean(jnp.argmax(logits_IJ, axis=1) == row_B),
        "text_to_image_accuracy": jnp.mean(jnp.argmax(logits_IJ, axis=0) == row_B),
    }
    return 0.5 * (image_to_text_B + text_to_image_B).mean(), metrics


def softmax_contrastive_loss(
    image_bE: Array, text_bE: Array, logit_scale: Array | float, *, axis_names: Sequence[str]
) -> tuple[Array, Metrics]:
    """The loss of `dense_softmax_contrastive_loss` over the global batch, inside `shard_map`.

    image_bE, text_bE: this device's rows, unit-length float32; the global batch is split over the
    mesh axes `axis_names` in order. Both embeddings are gathered, and each device holds two
    [b, B] logit blocks. Returns the same loss and accuracies on every device.
    """
    axes = tuple(axis_names)
    image_BE = jax.lax.all_gather(image_bE, axes, tiled=True)
    text_BE = jax.lax.all_gather(text_bE, axes, tiled=True)
    positive_b = logit_scale * jnp.sum(image_bE * text_bE, axis=-1)
    own_row_b = jax.lax.axis_index(axes) * image_bE.shape[0] + jnp.arange(image_bE.shape[0])

    def one_direction(query_bE: Array, key_BE: Array) -> tuple[Array, Array]:
        logits_bJ = logit_scale * _cosines(query_bE, key_BE)
        cross_entropy_b = jax.nn.logsumexp(logits_bJ, axis=1) - positive_b
        return cross_entropy_b, jnp.argmax(logits_bJ, axis=1) == own_row_b

    image_to_text_b, image_right_b = one_direction(image_bE, text_BE)
    text_to_image_b, text_right_b = one_direction(text_bE, image_BE)
    local = {
        "loss": 0.5 * (image_to_text_b + text_to_image_b).mean(),
        "image_to_text_accuracy": image_right_b.mean(),
        "text_to_image_accuracy": text_right_b.mean(),
    }
    metrics = jax.lax.pmean(local, axes)
    return metrics.pop("loss"), metrics
