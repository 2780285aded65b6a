"""BERT text tower (Devlin et al. 2019): post-norm blocks that do not see padding.

Shape suffixes: B batch, T tokens, D width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from clip_jax.config import TextTowerConfig
from clip_jax.models.blocks import run_blocks, run_blocks_to_tokens, stacked_blocks
from clip_jax.models.execution import Execution
from clip_jax.models.layers import Array, layer_norm, look_up
from clip_jax.models.text import check_length, mean_of_real, real_tokens


class BertTransformer(nnx.Module):
    """Tokens [B, T] int32 to pooled features [B, D] (float32) and token features [B, T, D].

    Padding is at the end of a row; what becomes of it in the token features means nothing. All
    tokens are of segment 0. T is at most `context_length`; raises UserError where it is more.
    """

    def __init__(self, config: TextTowerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.config, self.execution = config, execution

        def embedding(num: int) -> nnx.Param:
            std = config.token_embedding_std  # of all three: 0.02 in BERT's code
            return nnx.Param(std * jax.random.normal(rngs.params(), (num, config.width)))

        self.token_embedding = embedding(config.vocab_size)
        self.position_embedding = embedding(config.context_length)
        self.segment_embedding = embedding(config.num_segments)
        self.embedding_norm = layer_norm(config, execution, rngs=rngs)
        self.blocks = stacked_blocks(config, execution, is_causal=False, rngs=rngs, post_norm=True)
        if config.pooler:  # in float32: one row of a text, and it feeds the loss
            self.pooler = nnx.Linear(
                config.width,
                config.width,
                kernel_init=nnx.initializers.normal(0.02),  # BERT's code
                rngs=rngs,
            )

    def __call__(self, tokens_BT: Array) -> tuple[Array, Array]:
        check_length(tokens_BT, self.config)
        # Float32 until all are added, so that their gradients are summed in float32 as well.
        x_BTD = look_up(self.token_embedding[...], tokens_BT, self.execution)
        x_BTD = x_BTD + self.segment_embedding[0]
        x_BTD = x_BTD + self.position_embedding[: tokens_BT.shape[1]]
        x_BTD = self.embedding_norm(x_BTD).astype(self.execution.dtype)
        depth, lengths_B = self.config.depth, real_tokens(tokens_BT, self.config).sum(axis=1)
        if self.config.pooling == "mean":
            x_BTD = run_blocks(
                self.blocks, x_BTD, depth=depth, execution=self.execution, lengths_B=lengths_B
            )
            return mean_of_real(x_BTD, tokens_BT, self.config), x_BTD
        class_B1D, x_BTD = run_blocks_to_tokens(
            self.blocks, x_BTD, 0, depth=depth, execution=self.execution, lengths_B=lengths_B
        )
        pooled_BD = class_B1D[:, 0].astype(jnp.float32)
        if self.config.pooler:
            pooled_BD = jnp.tanh(self.pooler(pooled_BD))
        return pooled_BD, x_BTD
