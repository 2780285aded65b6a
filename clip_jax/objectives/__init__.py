"""Losses as pure functions on arrays."""

from clip_jax.objectives.contrastive import (
    dense_softmax_contrastive_loss,
    softmax_contrastive_loss,
)

__all__ = ["dense_softmax_contrastive_loss", "softmax_contrastive_loss"]
