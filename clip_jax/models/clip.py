"""Two towers that meet in one embedding space (CLIP, Radford et al. 2021).

Shape suffixes: B batch, D tower width, E embedding width.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from clip_jax.config import ModelConfig
from clip_jax.models.activations import ACTIVATIONS
from clip_jax.models.bert import BertTransformer
from clip_jax.models.cbow import BagOfWords
from clip_jax.models.execution import Execution
from clip_jax.models.layers import Array
from clip_jax.models.naflex import NaFlexTransformer
from clip_jax.models.resnet import ModifiedResNet
from clip_jax.models.text import TextTransformer
from clip_jax.models.vit import VisionTransformer


def unit_length(x_BE: Array) -> Array:
    """Rows scaled to length one. A zero row stays zero, with a finite gradient."""
    squared_B1 = jnp.sum(x_BE * x_BE, axis=-1, keepdims=True)
    return x_BE * jax.lax.rsqrt(jnp.maximum(squared_B1, 1e-24))


class CLIP(nnx.Module):
    """Image and text encoders with projections and a learned temperature."""

    def __init__(
        self,
        config: ModelConfig,
        execution: Execution | None = None,
        *,
        text_execution: Execution | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """text_execution: where the text tower's is another one."""
        execution = execution or Execution()
        text_execution = text_execution or execution
        self.config = config
        image, image_width = config.image, config.image.width
        self.image: ModifiedResNet | NaFlexTransformer | VisionTransformer
        if image.kind == "resnet":  # its pooling projects to the embedding
            image_width = config.embed_dim
            self.image = ModifiedResNet(image, execution, embed_dim=image_width, rngs=rngs)
        elif image.kind == "naflex":
            self.image = NaFlexTransformer(image, execution, rngs=rngs)
        else:
            self.image = VisionTransformer(image, execution, rngs=rngs)
        self.text: TextTransformer | BertTransformer | BagOfWords
        if config.text.kind == "bert":
            self.text = BertTransformer(config.text, text_execution, rngs=rngs)
        elif config.text.kind == "cbow":
            self.text = BagOfWords(config.text, text_execution, rngs=rngs)
        else:
            self.text = TextTransformer(config.text, text_execution, rngs=rngs)
        embed_dim = config.embed_dim
        self.image_projection = _projection(config.image_projection, image_width, embed_dim, rngs)
        self.text_projection = _projection(
            config.text_projection, config.text.width, embed_dim, rngs
        )
        self.log_logit_scale = nnx.Param(jnp.float32(math.log(config.logit_scale_init)))
        bias = config.logit_bias_init
        self.logit_bias = None if bias is None else nnx.Param(jnp.float32(bias))

    def encode_image(
        self, inputs: Mapping[str, Array], *, row_keys_B: Array | None = None
    ) -> Array:
        """Unit-length float32 [B, E].

        inputs: `image`, uint8 or normalised float [B, S, S, 3]; with a 'naflex' tower `patches`
        [B, T, P * P * 3], `patch_mask` [B, T] and `spatial_shapes` [B, 2]. row_keys_B: a key per
        row in training, which drops patches and replaces the running statistics of batch norm;
        None: evaluation.
        """
        if isinstance(self.image, NaFlexTransformer):
            arrays = (inputs["patches"], inputs["patch_mask"], inputs["spatial_shapes"])
            pooled_BD, _ = self.image(*arrays, row_keys_B=row_keys_B)
        else:
            pooled_BD, _ = self.image(inputs["image"], row_keys_B=row_keys_B)
        return unit_length(_project(self.image_projection, pooled_BD))

    def encode_text(self, inputs: Mapping[str, Array]) -> Array:
        """Unit-length float32 [B, E].

        inputs: `tokens`, int32 [B, T]. Packed captions, P groups of G in R rows each: `tokens` and
        `segments` [P, R, T] and `eot` [P, G], as `TextTransformer.packed` says, with B = P * G.
        """
        if "segments" in inputs:
            assert isinstance(self.text, TextTransformer), "refused by config.packing"
            pooled_BD = self.text.packed(inputs["tokens"], inputs["segments"], inputs["eot"])
        else:
            pooled_BD, _ = self.text(inputs["tokens"])
        return unit_length(_project(self.text_projection, pooled_BD))

    def logit_scale(self) -> Array:
        """The multiplier of the cosine, 1 / temperature; at most `config.logit_scale_max`."""
        return jnp.exp(self.log_logit_scale[...])


class ProjectionMLP(nnx.Module):
    """Two layers without biases and a GELU between them, as open_clip's."""

    def __init__(self, width: int, embed_dim: int, *, rngs: nnx.Rngs) -> None:
        hidden = (width + embed_dim) // 2
        self.up = _linear(width, hidden, use_bias=False, rngs=rngs)
        self.down = _linear(hidden, embed_dim, use_bias=False, rngs=rngs)

    def __call__(self, x_BD: Array) -> Array:
        return self.down(ACTIVATIONS["gelu"](self.up(x_BD)))


def _projection(
    kind: str, width: int, embed_dim: int, rngs: nnx.Rngs
) -> nnx.Linear | ProjectionMLP | None:
    if kind == "none":
        return None
    if kind == "mlp":
        return ProjectionMLP(width, embed_dim, rngs=rngs)
    return _linear(width, embed_dim, use_bias=kind == "linear_bias", rngs=rngs)


def _linear(width: int, width_out: int, *, use_bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
    # Full float32 whatever the towers compute in: a thousandth of the work, and it feeds the loss.
    return nnx.Linear(
        width,
        width_out,
        use_bias=use_bias,
        kernel_init=nnx.initializers.normal(width**-0.5),
        precision=jax.lax.Precision.HIGHEST,
        rngs=rngs,
    )


def _project(projection: nnx.Linear | ProjectionMLP | None, pooled_BD: Array) -> Array:
    return pooled_BD if projection is None else projection(pooled_BD)
