"""Two towers that meet in one embedding space (CLIP, Radford et al. 2021).

Shape suffixes: B batch, D tower width, E embedding width.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from clip_jax.config import ModelConfig
from clip_jax.models.layers import Array, Execution
from clip_jax.models.text import TextTransformer
from clip_jax.models.vit import VisionTransformer


def unit_length(x_BE: Array) -> Array:
    """Rows scaled to length one. A zero row stays zero, with a finite gradient."""
    squared_B1 = jnp.sum(x_BE * x_BE, axis=-1, keepdims=True)
    return x_BE * jax.lax.rsqrt(jnp.maximum(squared_B1, 1e-24))


class CLIP(nnx.Module):
    """Image and text encoders with projections and a learned temperature."""

    def __init__(
        self, config: ModelConfig, execution: Execution | None = None, *, rngs: nnx.Rngs
    ) -> None:
        execution = execution or Execution()
        self.config = config
        self.image = VisionTransformer(config.image, execution, rngs=rngs)
        self.text = TextTransformer(config.text, execution, rngs=rngs)
        self.image_projection = _projection(config.image.width, config.embed_dim, rngs)
        self.text_projection = _projection(config.text.width, config.embed_dim, rngs)
        self.log_logit_scale = nnx.Param(jnp.float32(math.log(config.logit_scale_init)))
        bias = config.logit_bias_init
        self.logit_bias = None if bias is None else nnx.Param(jnp.float32(bias))

    def encode_image(self, image_inputs: Mapping[str, Array]) -> Array:
        """`image`: uint8 or normalised float [B, S, S, 3]. Unit-length float32 [B, E]."""
        pooled_BD, _ = self.image(image_inputs["image"])
        return unit_length(self.image_projection(pooled_BD))

    def encode_text(self, text_inputs: Mapping[str, Array]) -> Array:
        """`tokens`: int32 [B, T]. Unit-length float32 [B, E]."""
        pooled_BD, _ = self.text(text_inputs["tokens"])
        return unit_length(self.text_projection(pooled_BD))

    def logit_scale(self) -> Array:
        """The multiplier of the cosine, 1 / temperature; at most `config.logit_scale_max`."""
        return jnp.exp(self.log_logit_scale[...])


def _projection(width: int, embed_dim: int, rngs: nnx.Rngs) -> nnx.Linear:
    # Full float32 whatever the towers compute in: a thousandth of the work, and it feeds the loss.
    return nnx.Linear(
        width,
        embed_dim,
        use_bias=False,
        kernel_init=nnx.initializers.normal(width**-0.5),
        precision=jax.lax.Precision.HIGHEST,
        rngs=rngs,
    )
