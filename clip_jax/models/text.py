"""Transformer text tower: CLIP's causal one and SigLIP's bidirectional one.

Radford et al. 2021 (section 2.4), Zhai et al. 2023. Shape suffixes: B batch, T tokens, D width,
V vocabulary; of packed captions P groups, G captions of a group, R rows of a group, S = R * T.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from clip_jax.config import TextTowerConfig, UserError
from clip_jax.models.blocks import run_blocks, run_blocks_to_tokens, stacked_blocks
from clip_jax.models.execution import Execution
from clip_jax.models.layers import Array, layer_norm, look_up
from clip_jax.models.pooling import AttentionPooling


def real_tokens(tokens_BT: Array, config: TextTowerConfig) -> Array:
    """Which tokens are text and not padding: bool [B, T].

    Up to and including the first `eot_id` where the tower has one and so has the row (what follows
    is padding, whatever it is; `pad_id` may stand for a word before it, as 0 is '!' to CLIP).
    Otherwise every token other than `pad_id`.
    """
    is_text_BT = tokens_BT != config.pad_id
    if config.eot_id is None:
        return is_text_BT
    is_eot_BT = tokens_BT == config.eot_id
    num_eot_before_BT = jnp.cumsum(is_eot_BT, axis=1) - is_eot_BT
    return jnp.where(is_eot_BT.any(axis=1, keepdims=True), num_eot_before_BT == 0, is_text_BT)


def mean_of_real(x_BTD: Array, tokens_BT: Array, config: TextTowerConfig) -> Array:
    """Mean over the real tokens, float32 [B, D]; zeros for a row that has none."""
    is_real_BT1 = real_tokens(tokens_BT, config)[:, :, None]
    sum_BD = jnp.where(is_real_BT1, x_BTD, 0).sum(axis=1, dtype=jnp.float32)
    return sum_BD / jnp.maximum(is_real_BT1.sum(axis=1), 1)


def check_length(tokens_BT: Array, config: TextTowerConfig) -> None:
    """Raises UserError where rows are longer than the positions that the tower has."""
    if tokens_BT.shape[1] > config.context_length:
        raise UserError(
            f"rows of {tokens_BT.shape[1]} tokens do not fit the tower's context_length "
            f"{config.context_length}; cut them there, with the end of text kept"
        )


class TextTransformer(nnx.Module):
    """Tokens [B, T] int32 to pooled features [B, D] (float32) and token features [B, T, D].

    T is at most `context_length`; raises UserError where it is more. Attention sees padding, as in
    both papers: where `config.causal` it comes too late to reach the end of text. Pooling 'eot' of
    a row without `eot_id`, which our tokenizers do not make, is that of its first position.
    """

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
        self.blocks = stacked_blocks(config, execution, is_causal=config.causal, rngs=rngs)
        self.final_norm = layer_norm(config, execution, rngs=rngs)
        if config.pooling == "attention":
            self.pooling = AttentionPooling(config, execution, rngs=rngs)

    def __call__(self, tokens_BT: Array) -> tuple[Array, Array]:
        check_length(tokens_BT, self.config)
        # Float32 until both are added: then their gradients are summed in float32 as well, over
        # the batch and over all places of a token. In bfloat16 such a sum stalls at 256 terms.
        x_BTD = look_up(self.token_embedding[...], tokens_BT, self.execution)
        x_BTD = x_BTD + self.position_embedding[: tokens_BT.shape[1]]
        x_BTD = x_BTD.astype(self.execution.dtype)
        places_B1 = self._pooled_places(tokens_BT)
        if places_B1 is None:
            x_BTD = run_blocks(
                self.blocks, x_BTD, depth=self.config.depth, execution=self.execution
            )
            x_BTD = self.final_norm(x_BTD)
            return self._pool(x_BTD, tokens_BT).astype(jnp.float32), x_BTD
        pooled_B1D, x_BTD = run_blocks_to_tokens(
            self.blocks, x_BTD, places_B1, depth=self.config.depth, execution=self.execution
        )
        pooled_B1D, x_BTD = self.final_norm(pooled_B1D), self.final_norm(x_BTD)
        return pooled_B1D[:, 0].astype(jnp.float32), x_BTD

    def packed(self, tokens_PRT: Array, segments_PRT: Array, eot_PG: Array) -> Array:
        """Pooled features [P * G, D] (float32) of captions that share rows (Krell et al. 2021).

        segments_PRT: int32, 1, 2, ... by caption in each row, 0: padding. eot_PG: int32, where each
        caption ends in its group, row * T + position. The features are those of a caption to a
        row, for a causal tower that pools at the end of text (`config.packing.check_packing`).
        """
        P, R, T = tokens_PRT.shape
        tokens_BT, segments_BT = (x.reshape(P * R, T) for x in (tokens_PRT, segments_PRT))
        check_length(tokens_BT, self.config)
        x_BTD = look_up(self.token_embedding[...], tokens_BT, self.execution) + self._positions(
            segments_BT
        )
        # Places in each group, which is whole on a device: of a gather over the batch, the
        # partitioner would make an all-reduce of all hidden states.
        x_PGD, _ = run_blocks_to_tokens(
            self.blocks,
            x_BTD.astype(self.execution.dtype),
            eot_PG,
            depth=self.config.depth,
            execution=self.execution,
            segments_BT=segments_BT,
        )
        return self.final_norm(x_PGD).reshape(eot_PG.size, -1).astype(jnp.float32)

    def _positions(self, segments_BT: Array) -> Array:
        """Position embeddings [B, T, D] of tokens counted from the start of their caption."""
        T = segments_BT.shape[1]
        begins_BT = jnp.diff(segments_BT, axis=1, prepend=-1) != 0
        start_BT = jax.lax.cummax(jnp.where(begins_BT, jnp.arange(T), 0), axis=1)
        # A product, not a gather: its gradient is a sum that accelerators are made for, where a
        # gather's would add B * T vectors one by one into T.
        one_hot_BTS = jax.nn.one_hot(jnp.arange(T) - start_BT, T)
        return jnp.einsum(
            "bts,sd->btd",
            one_hot_BTS,
            self.position_embedding[:T],
            precision=jax.lax.Precision.HIGHEST,
        )

    def _pooled_places(self, tokens_BT: Array) -> Array | int | None:
        """Of the one token of a row that is pooled, int32 [B, 1] or of all rows; None: of more."""
        match self.config.pooling:
            case "eot":  # the first: padding may repeat it
                return jnp.argmax(tokens_BT == self.config.eot_id, axis=1, keepdims=True)
            case "last":
                return tokens_BT.shape[1] - 1
            case "class_token":
                return 0
        return None

    def _pool(self, x_BTD: Array, tokens_BT: Array) -> Array:
        if self.config.pooling == "mean":
            return mean_of_real(x_BTD, tokens_BT, self.config)
        return self.pooling(x_BTD)
