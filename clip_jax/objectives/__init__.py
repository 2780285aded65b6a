"""Losses as pure functions on arrays."""

from clip_jax.objectives.contrastive import (
    contrastive_loss,
    sigmoid_contrastive_loss,
    softmax_contrastive_loss,
)
from clip_jax.objectives.dense import (
    dense_sigmoid_contrastive_loss,
    dense_softmax_contrastive_loss,
)

__all__ = [
    "contrastive_loss",
    "dense_sigmoid_contrastive_loss",
    "dense_softmax_contrastive_loss",
    "sigmoid_contrastive_loss",
    "softmax_contrastive_loss",
]
