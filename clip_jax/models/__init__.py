"""flax.nnx modules: layers, towers, and the two-tower model."""

from clip_jax.models.clip import CLIP, unit_length
from clip_jax.models.flops import forward_flops
from clip_jax.models.layers import Execution
from clip_jax.models.text import TextTransformer
from clip_jax.models.vit import VisionTransformer

__all__ = [
    "CLIP",
    "Execution",
    "TextTransformer",
    "VisionTransformer",
    "forward_flops",
    "unit_length",
]
