"""Vision Transformer image tower (Dosovitskiy et al. 2021), patch or convolutional stem.

Shape suffixes: B batch, H rows, W columns, C channels, T tokens, P pixels of a patch, D width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from clip_jax.config import ImageTowerConfig
from clip_jax.models.blocks import run_blocks, run_blocks_to_tokens, stacked_blocks
from clip_jax.models.execution import Execution
from clip_jax.models.layers import Array, layer_norm
from clip_jax.models.pooling import AttentionPooling
from clip_jax.models.positions import sincos2d


def normalize_image(image_BHWC: Array, config: ImageTowerConfig) -> Array:
    """uint8 pixels [..., 3] to float32 of zero mean, unit deviation; floats pass as they are."""
    if image_BHWC.dtype != jnp.uint8:
        return image_BHWC
    mean_C, std_C = jnp.asarray(config.mean), jnp.asarray(config.std)
    return (image_BHWC.astype(jnp.float32) / 255 - mean_C) / std_C


class PatchStem(nnx.Module):
    """Non-overlapping patches and one linear map."""

    def __init__(self, config: ImageTowerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.patch_size = config.patch_size
        fan_in = 3 * config.patch_size**2
        self.project = nnx.Linear(
            fan_in,
            config.width,
            use_bias=config.patch_bias,
            kernel_init=nnx.initializers.normal(fan_in**-0.5),
            dtype=execution.dtype,
            rngs=rngs,
        )

    def __call__(self, image_BHWC: Array) -> Array:
        # A reshape and a matrix product: the same arithmetic as a strided convolution, and the
        # form that every backend runs at full speed.
        _, height, width, _ = image_BHWC.shape
        rest = (height % self.patch_size, width % self.patch_size)  # 0, but for crop_to_patches
        image_BHWC = image_BHWC[:, : height - rest[0], : width - rest[1]]
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


def drop_patches(
    x_BTD: Array, lengths_B: Array, *, rate: float, row_keys_B: Array
) -> tuple[Array, Array]:
    """A random subset of each row's patches (FLIP, Li et al. 2023, section 3), and their number.

    lengths_B: int32, the patches of each row; what comes after them is padding. Of n patches
    max(1, int(n * (1 - rate))) stay, in random order: their positions are in them already. What
    stays of the padding comes after them. row_keys_B: a key per row, so that a row keeps the same
    patches wherever it is computed.
    """
    num_patches = x_BTD.shape[1]
    kept = [max(1, int(length * (1 - rate))) for length in range(num_patches + 1)]
    score_BT = jax.vmap(lambda key: jax.random.uniform(key, (num_patches,)))(row_keys_B)
    score_BT = jnp.where(jnp.arange(num_patches) < lengths_B[:, None], score_BT, 2.0)
    chosen_BT = jnp.argsort(score_BT, axis=1)[:, : kept[-1]]
    x_BTD = jnp.take_along_axis(x_BTD, chosen_BT[:, :, None], axis=1)
    return x_BTD, jnp.asarray(kept, jnp.int32)[lengths_B]


class VisionTransformer(nnx.Module):
    """Images [B, S, S, 3] to pooled features [B, D] (float32) and token features [B, T, D].

    Tokens: the class token, the registers, then the patches row by row; all after the final norm,
    unless that comes after pooling. Pooling 'mean' and 'attention' look at the patches alone, as
    in open_clip and timm. With 'none' there are no pooled features: the tokens stand for them.
    """

    def __init__(self, config: ImageTowerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.config, self.execution = config, execution
        stem = PatchStem if config.stem == "patch" else ConvStem
        self.stem = stem(config, execution, rngs=rngs)
        scale = config.width**-0.5  # Radford et al. 2021, released code

        def embedding(*shape: int) -> nnx.Param:
            return nnx.Param(scale * jax.random.normal(rngs.params(), shape))

        if config.class_token:
            self.class_embedding = embedding(config.width)
        if config.position_embedding == "learned":
            num_patches = (config.image_size // config.patch_size) ** 2
            self.position_embedding = embedding(config.class_token + num_patches, config.width)
        if config.num_registers:
            self.register_embedding = embedding(config.num_registers, config.width)
        if config.pre_norm:
            self.pre_norm = layer_norm(config, execution, rngs=rngs)
        self.blocks = stacked_blocks(config, execution, is_causal=False, rngs=rngs)
        self.final_norm = final_norm(config, execution, rngs=rngs)
        if config.pooling == "attention":
            self.pooling = AttentionPooling(config, execution, rngs=rngs)

    def __call__(
        self, image_BHWC: Array, *, row_keys_B: Array | None = None
    ) -> tuple[Array, Array]:
        """image: uint8 or normalised. row_keys_B: in training, a key per row for patch dropout."""
        config, dtype = self.config, self.execution.dtype
        x_BTD = self.stem(normalize_image(image_BHWC, config).astype(dtype))
        prefix = []
        if config.position_embedding == "learned":
            position_TD = self.position_embedding[...].astype(dtype)
            x_BTD = x_BTD + position_TD[config.class_token :]
        else:  # the class token has none
            grid = config.image_size // config.patch_size
            x_BTD = x_BTD + sincos2d((grid, grid), config.width).astype(dtype)
        if config.class_token:
            class_1D = self.class_embedding[...].astype(dtype)[None]
            if config.position_embedding == "learned":
                class_1D = class_1D + position_TD[:1]
            prefix.append(class_1D)
        if config.num_registers:
            prefix.append(self.register_embedding[...].astype(dtype))
        if config.patch_dropout and row_keys_B is not None:
            lengths_B = jnp.full(len(x_BTD), x_BTD.shape[1], jnp.int32)
            x_BTD, _ = drop_patches(
                x_BTD, lengths_B, rate=config.patch_dropout, row_keys_B=row_keys_B
            )
        x_BTD = prepend(prefix, x_BTD)
        if config.pre_norm:
            x_BTD = self.pre_norm(x_BTD)
        if config.pooling == "class_token":
            class_B1D, x_BTD = run_blocks_to_tokens(
                self.blocks, x_BTD, 0, depth=config.depth, execution=self.execution
            )
            pooled_BD = class_B1D[:, 0]
            if not config.norm_after_pooling:
                pooled_BD, x_BTD = self.final_norm(pooled_BD), self.final_norm(x_BTD)
        else:
            x_BTD = run_blocks(self.blocks, x_BTD, depth=config.depth, execution=self.execution)
            if not config.norm_after_pooling:
                x_BTD = self.final_norm(x_BTD)
            pooled_BD = self._pool(x_BTD)
        if config.norm_after_pooling:
            pooled_BD = self.final_norm(pooled_BD)
        return pooled_BD.astype(jnp.float32), x_BTD

    def _pool(self, x_BTD: Array) -> Array:
        config = self.config
        if config.pooling == "none":
            return x_BTD
        patches_BTD = x_BTD[:, config.class_token + config.num_registers :]
        if config.pooling == "mean":
            return patches_BTD.astype(jnp.float32).mean(axis=1)
        return self.pooling(patches_BTD)


def final_norm(config: ImageTowerConfig, execution: Execution, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """The norm after the last block; in float32 where pooled features come out of it."""
    if config.norm_after_pooling:
        execution = dataclasses.replace(execution, dtype=jnp.float32)
    return layer_norm(config, execution, rngs=rngs)


def prepend(prefix: list[Array], x_BTD: Array) -> Array:
    """Tokens [.., D] that are the same for all rows, in front of each row."""
    B, _, D = x_BTD.shape
    rows = [jnp.broadcast_to(tokens_RD, (B, len(tokens_RD), D)) for tokens_RD in prefix]
    return jnp.concatenate([*rows, x_BTD], axis=1) if rows else x_BTD
