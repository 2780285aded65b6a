"""Attention pooling (MAP head, Zhai et al. 2022): one learned query attends to all tokens.

Shape suffixes: B batch, T tokens, D width, N heads, H head width.
"""

import jax.numpy as jnp
from flax import nnx

from clip_jax.models.execution import Execution
from clip_jax.models.layers import MLP, Array, TowerConfig, attention, layer_norm


class AttentionPooling(nnx.Module):
    """Tokens [B, T, D] to features [B, D], by attention and one MLP as in big_vision."""

    def __init__(self, config: TowerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
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

    def __call__(self, x_BTD: Array, lengths_B: Array | None = None) -> Array:
        """lengths_B: int32, real tokens of each row; the padding after them is not looked at."""
        # The query is the same for all rows: projected once, not B times.
        probe_11D = self.probe[...].astype(x_BTD.dtype)[None]
        query_11NH = self.query(probe_11D)
        query_B1NH = jnp.broadcast_to(query_11NH, (x_BTD.shape[0], *query_11NH.shape[1:]))
        key_value_BT2NH = self.key_value(x_BTD)
        mixed_B1NH = attention(
            query_B1NH,
            key_value_BT2NH[:, :, 0],
            key_value_BT2NH[:, :, 1],
            is_causal=False,
            execution=self.execution,
            lengths_B=lengths_B,
        )
        pooled_B1D = self.out(mixed_B1NH)
        pooled_B1D = pooled_B1D + self.mlp(self.norm(pooled_B1D))
        return pooled_B1D[:, 0]
