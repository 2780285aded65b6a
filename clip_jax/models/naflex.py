"""Image tower for any size and shape: padded sequences of patches (SigLIP 2's NaFlex).

Shape suffixes: B batch, T tokens (patches, padding at the end), P values of a patch, D width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from clip_jax.config import ImageTowerConfig
from clip_jax.models.blocks import run_blocks, stacked_blocks
from clip_jax.models.execution import Execution
from clip_jax.models.layers import Array, layer_norm
from clip_jax.models.pooling import AttentionPooling
from clip_jax.models.positions import resampled_per_sample, sincos2d
from clip_jax.models.vit import PatchStem, drop_patches, final_norm, normalize_image, prepend


class NaFlexTransformer(nnx.Module):
    """Patches [B, T, P] to pooled features [B, D] (float32) and token features [B, T, D].

    NaFlex, Tschannen et al. 2025 (SigLIP 2), section 2.4.2.
    As `VisionTransformer`, without a class token; position embeddings of the grid of `image_size`
    are resampled to each image's own. Token features at padding mean nothing.
    """

    def __init__(self, config: ImageTowerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.config, self.execution = config, execution
        self.grid = config.image_size // config.patch_size
        self.stem = PatchStem(config, execution, rngs=rngs)
        scale = config.width**-0.5  # as VisionTransformer
        if config.position_embedding == "learned":
            self.position_embedding = nnx.Param(
                scale * jax.random.normal(rngs.params(), (self.grid**2, config.width))
            )
        if config.num_registers:
            self.register_embedding = nnx.Param(
                scale * jax.random.normal(rngs.params(), (config.num_registers, config.width))
            )
        if config.pre_norm:
            self.pre_norm = layer_norm(config, execution, rngs=rngs)
        self.blocks = stacked_blocks(config, execution, is_causal=False, rngs=rngs)
        self.final_norm = final_norm(config, execution, rngs=rngs)
        if config.pooling == "attention":
            self.pooling = AttentionPooling(config, execution, rngs=rngs)

    def __call__(
        self,
        patches_BTP: Array,
        patch_mask_BT: Array,
        spatial_shapes_B2: Array,
        *,
        row_keys_B: Array | None = None,
    ) -> tuple[Array, Array]:
        """patches: uint8 or normalised, each by rows, columns, channels; the image row by row.

        patch_mask: true for patches, false for the padding after them. spatial_shapes: int32,
        rows and columns of patches. row_keys_B: in training, a key per row for patch dropout.
        """
        config, dtype = self.config, self.execution.dtype
        B, T, P = patches_BTP.shape
        pixels = normalize_image(patches_BTP.reshape(B, T, P // 3, 3), config)
        x_BTD = self.stem.project(pixels.reshape(B, T, P).astype(dtype))
        x_BTD = x_BTD + self._positions(spatial_shapes_B2, T)
        lengths_B = patch_mask_BT.sum(axis=1, dtype=jnp.int32)
        if config.patch_dropout and row_keys_B is not None:
            x_BTD, lengths_B = drop_patches(
                x_BTD, lengths_B, rate=config.patch_dropout, row_keys_B=row_keys_B
            )
        if config.num_registers:
            x_BTD = prepend([self.register_embedding[...].astype(dtype)], x_BTD)
        if config.pre_norm:
            x_BTD = self.pre_norm(x_BTD)
        x_BTD = run_blocks(
            self.blocks,
            x_BTD,
            depth=config.depth,
            execution=self.execution,
            lengths_B=lengths_B + config.num_registers,
        )
        if not config.norm_after_pooling:
            x_BTD = self.final_norm(x_BTD)
        pooled_BD = self._pool(x_BTD, lengths_B)
        if config.norm_after_pooling:
            pooled_BD = self.final_norm(pooled_BD)
        return pooled_BD.astype(jnp.float32), x_BTD

    def _positions(self, spatial_shapes_B2: Array, num_tokens: int) -> Array:
        grid, width = self.grid, self.config.width
        if self.config.position_embedding == "learned":
            table_TD = self.position_embedding[...]
        else:
            table_TD = sincos2d((grid, grid), width)
        table_GGD = table_TD.astype(self.execution.dtype).reshape(grid, grid, width)
        # The backward pass makes the matrices again: they are as large as a head's attention.
        resample = jax.checkpoint(resampled_per_sample, static_argnums=2)
        return resample(table_GGD, spatial_shapes_B2, num_tokens)

    def _pool(self, x_BTD: Array, lengths_B: Array) -> Array:
        if self.config.pooling == "none":
            return x_BTD
        patches_BTD = x_BTD[:, self.config.num_registers :]
        if self.config.pooling == "attention":
            return self.pooling(patches_BTD, lengths_B)
        real_BT1 = (jnp.arange(patches_BTD.shape[1]) < lengths_B[:, None])[:, :, None]
        total_BD = jnp.where(real_BT1, patches_BTD.astype(jnp.float32), 0).sum(axis=1)
        return total_BD / jnp.maximum(lengths_B, 1)[:, None]
