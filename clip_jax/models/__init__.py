"""flax.nnx modules: layers, towers, and the two-tower model."""

from clip_jax.models.bert import BertTransformer
from clip_jax.models.cbow import BagOfWords
from clip_jax.models.clip import CLIP, unit_length
from clip_jax.models.execution import Execution
from clip_jax.models.flops import forward_flops
from clip_jax.models.naflex import NaFlexTransformer
from clip_jax.models.positions import resample_position_embedding, stretch_position_embedding
from clip_jax.models.resnet import ModifiedResNet
from clip_jax.models.text import TextTransformer
from clip_jax.models.vit import VisionTransformer

__all__ = [
    "CLIP",
    "BagOfWords",
    "BertTransformer",
    "Execution",
    "ModifiedResNet",
    "NaFlexTransformer",
    "TextTransformer",
    "VisionTransformer",
    "forward_flops",
    "resample_position_embedding",
    "stretch_position_embedding",
    "unit_length",
]
