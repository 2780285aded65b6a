"""Vision Transformer image tower (Dosovitskiy et al. 2021), patch or convolutional stem.

Shape suffixes: B batch, H rows, W columns, C channels, T tokens, P pixels of a patch, D width.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from clip_jax.config import ImageTowerConfig
from clip_jax.models.layers import (
    MLP,
    Array,
    Execution,
    attention,
    layer_norm,
    run_blocks,
    stacked_blocks,
)


def normalize_image(image_BHWC: Array, config: ImageTowerConfig) -> Array:
    """uint8 pixels to float32 of zero mean, unit deviation; floats pass as already normalised."""
    if image_BHWC.dtype != jnp.uint8:
        return image_BHWC
    mean_C, std_C = jnp.asarray(config.mean), jnp.asarray(config.std)
    return (image_BHWC.astype(jnp.float32) / 255 - mean_C) / std_C


class PatchStem(nnx.Module):
    """Non-overlapping patches and one linear map, without a bias."""

    def __init__(self, config: ImageTowerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.patch_size = config.patch_size
        fan_in = 3 * config.patch_size**2
        self.project = nnx.Linear(
            fan_in,
            config.width,
            use_bias=False,
            kernel_init=nnx.initializers.normal(fan_in**-0.5),
            dtype=execution.dtype,
            rngs=rngs,
        )

    def __call__(self, image_BHWC: Array) -> Array:
        # A reshape and a matrix product: the same arithmetic as a strided convolution, and the
        # form that every backend runs at full speed.
        patches_BHWP = _fold(image_BHWC, self.patch_size)
        B, H, W, P = patches_BHWP.shape
        return self.project(patches_BHWP.reshape(B, H * W, P))


class ConvStem(nnx.Module):
    """Strided 3x3 convolutions, then 1x1 (Xiao et al. 2021, "Early convolutions").

    Layer norm over the channels stands where the paper has batch norm, so that an example's
    embedding does not depend on its batch. Where `patch_size` is more than the product of the
    strides, pixels are first folded into channels (space to depth): convolutions with few channels
    are slow on every backend.
    """

    def __init__(self, config: ImageTowerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.num_convolutions = len(config.stem_widths)
        self.fold = config.patch_size // math.prod(config.stem_strides)
        widths = (3 * self.fold**2, *config.stem_widths)
        for i in range(self.num_convolutions):
            convolution = nnx.Conv(
                widths[i],
                widths[i + 1],
                (3, 3),
                strides=config.stem_strides[i],
                padding=1,
                use_bias=False,
                kernel_init=nnx.initializers.he_normal(),
                dtype=execution.dtype,
                rngs=rngs,
            )
            norm = nnx.LayerNorm(
                widths[i + 1], use_fast_variance=False, dtype=execution.dtype, rngs=rngs
            )
            setattr(self, f"convolution_{i}", convolution)
            setattr(self, f"norm_{i}", norm)
        self.project = nnx.Linear(
            widths[-1],
            config.width,
            kernel_init=nnx.initializers.normal(widths[-1] ** -0.5),
            dtype=execution.dtype,
            rngs=rngs,
        )

    def __call__(self, image_BHWC: Array) -> Array:
        x_BHWC = _fold(image_BHWC, self.fold)
        for i in range(self.num_convolutions):
            x_BHWC = getattr(self, f"convolution_{i}")(x_BHWC)
            x_BHWC = jax.nn.relu(getattr(self, f"norm_{i}")(x_BHWC))
        x_BHWD = self.project(x_BHWC)
        return x_BHWD.reshape(x_BHWD.shape[0], -1, x_BHWD.shape[-1])


def _fold(image_BHWC: Array, size: int) -> Array:
    """Blocks of size x size pixels to channels: [B, H / size, W / size, size * size * C]."""
    B, H, W, C = image_BHWC.shape
    blocks = image_BHWC.reshape(B, H // size, size, W // size, size, C)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(B, H // size, W // size, size * size * C)


class AttentionPooling(nnx.Module):
    """A learned query attends to all tokens (MAP head, Zhai et al. 2022, as in big_vision)."""

    def __init__(self, config: ImageTowerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        heads, head_width = config.num_heads, config.width // config.num_heads
        init = nnx.initializers.xavier_uniform()
        self.execution = execution
        self.probe = nnx.Param(init(rngs.params(), (1, config.width)))
        self.query = nnx.LinearGeneral(
            config.width, (heads, head_width), dtype=execution.dtype, rngs=rngs
        )
        self.key_value = nnx.LinearGeneral(
            config.width, (2, heads, head_width), dtype=execution.dtype, rngs=rngs
        )
        self.out = nnx.LinearGeneral(
            (heads, head_width), config.width, axis=(-2, -1), dtype=execution.dtype, rngs=rngs
        )
        self.norm = layer_norm(config, execution, rngs=rngs)
        self.mlp = MLP(config, execution, rngs=rngs)

    def __call__(self, x_BTD: Array) -> Array:
        B, _, D = x_BTD.shape
        probe_B1D = jnp.broadcast_to(self.probe[...].astype(x_BTD.dtype), (B, 1, D))
        key_value_BT2NH = self.key_value(x_BTD)
        mixed_B1NH = attention(
            self.query(probe_B1D),
            key_value_BT2NH[:, :, 0],
            key_value_BT2NH[:, :, 1],
            is_causal=False,
            execution=self.execution,
        )
        pooled_B1D = self.out(mixed_B1NH)
        pooled_B1D = pooled_B1D + self.mlp(self.norm(pooled_B1D))
        return pooled_B1D[:, 0]


class VisionTransformer(nnx.Module):
    """Images to pooled features [B, D] (float32) and token features [B, T, D]."""

    def __init__(self, config: ImageTowerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.config, self.execution = config, execution
        stem = PatchStem if config.stem == "patch" else ConvStem
        self.stem = stem(config, execution, rngs=rngs)
        num_tokens = (config.image_size // config.patch_size) ** 2
        scale = config.width**-0.5  # Radford et al. 2021, released code
        if config.class_token:
            num_tokens += 1
            self.class_embedding = nnx.Param(
                scale * jax.random.normal(rngs.params(), (config.width,))
            )
        self.position_embedding = nnx.Param(
            scale * jax.random.normal(rngs.params(), (num_tokens, config.width))
        )
        if config.pre_norm:
            self.pre_norm = layer_norm(config, execution, rngs=rngs)
        self.blocks = stacked_blocks(config, execution, is_causal=False, rngs=rngs)
        self.final_norm = layer_norm(config, execution, rngs=rngs)
        if config.pooling == "attention":
            self.pooling = AttentionPooling(config, execution, rngs=rngs)

    def __call__(self, image_BHWC: Array) -> tuple[Array, Array]:
        dtype = self.execution.dtype
        x_BTD = self.stem(normalize_image(image_BHWC, self.config).astype(dtype))
        if self.config.class_token:
            shape = (x_BTD.shape[0], 1, x_BTD.shape[2])
            class_B1D = jnp.broadcast_to(self.class_embedding[...].astype(dtype), shape)
            x_BTD = jnp.concatenate([class_B1D, x_BTD], axis=1)
        x_BTD = x_BTD + self.position_embedding[...].astype(dtype)
        if self.config.pre_norm:
            x_BTD = self.pre_norm(x_BTD)
        x_BTD = run_blocks(self.blocks, x_BTD, depth=self.config.depth, execution=self.execution)
        x_BTD = self.final_norm(x_BTD)
        return self._pool(x_BTD).astype(jnp.float32), x_BTD

    def _pool(self, x_BTD: Array) -> Array:
        if self.config.pooling == "class_token":
            return x_BTD[:, 0]
        if self.config.pooling == "mean":
            return x_BTD.astype(jnp.float32).mean(axis=1)
        return self.pooling(x_BTD)
