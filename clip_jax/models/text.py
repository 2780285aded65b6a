"""Causal Transformer text tower, pooled at the end-of-text token (Radford et al. 2021).

Shape suffixes: B batch, T tokens, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from clip_jax.config import TextTowerConfig
from clip_jax.models.layers import Array, Execution, layer_norm, run_blocks, stacked_blocks


class TextTransformer(nnx.Module):
    """Tokens [B, T] int32 to pooled features [B, D] (float32) and token features [B, T, D]."""

    def __init__(self, config: TextTowerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.config, self.execution = config, execution
        # Standard deviations: Radford et al. 2021, released code.
        self.token_embedding = nnx.Param(
            config.token_embedding_std
            * jax.random.normal(rngs.params(), (config.vocab_size, config.width))
        )
        self.position_embedding = nnx.Param(
            0.01 * jax.random.normal(rngs.params(), (config.context_length, config.width))
        )
        self.blocks = stacked_blocks(config, execution, is_causal=True, rngs=rngs)
        self.final_norm = layer_norm(config, execution, rngs=rngs)

    def __call__(self, tokens_BT: Array) -> tuple[Array, Array]:
        dtype = self.execution.dtype
        x_BTD = self.token_embedding[...].astype(dtype)[tokens_BT]
        x_BTD = x_BTD + self.position_embedding[: tokens_BT.shape[1]].astype(dtype)
        x_BTD = run_blocks(self.blocks, x_BTD, depth=self.config.depth, execution=self.execution)
        x_BTD = self.final_norm(x_BTD)
        # The first end of text: padding may repeat it. Attention is causal, so what follows the
        # end of text cannot reach the embedding.
        eot_B = jnp.argmax(tokens_BT == self.config.eot_id, axis=1)
        pooled_BD = jnp.take_along_axis(x_BTD, eot_B[:, None, None], axis=1)[:, 0]
        return pooled_BD.astype(jnp.float32), x_BTD
