"""Transformer blocks, and how a tower runs its stack of them.

Shape suffixes: B batch, T tokens, D model width; K tokens of a row that are asked for; of packed
rows P groups, R rows of a group, S = R * T.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clip_jax.config import ImageTowerConfig
from clip_jax.models.execution import REMAT_POLICIES, Execution
from clip_jax.models.gradients import together
from clip_jax.models.layers import MLP, Array, Attention, Queries, TowerConfig, layer_norm


class Block(nnx.Module):
    """Pre-norm Transformer block, with LayerScale where the config has it."""

    def __init__(
        self, config: TowerConfig, execution: Execution, *, is_causal: bool, rngs: nnx.Rngs
    ) -> None:
        self.attention_norm = layer_norm(config, execution, rngs=rngs)
        self.attention = Attention(config, execution, is_causal=is_causal, rngs=rngs)
        self.mlp_norm = layer_norm(config, execution, rngs=rngs)
        self.mlp = MLP(config, execution, rngs=rngs)
        scale = config.layer_scale_init if isinstance(config, ImageTowerConfig) else None
        self.layer_scale = scale is not None
        if scale is not None:  # Touvron et al. 2021 (CaiT), equation 4
            self.attention_scale = nnx.Param(jnp.full((config.width,), scale, jnp.float32))
            self.mlp_scale = nnx.Param(jnp.full((config.width,), scale, jnp.float32))

    def __call__(
        self,
        x_BTD: Array,
        lengths_B: Array | None = None,
        segments_BT: Array | None = None,
        places_BK: Array | int | None = None,
    ) -> Array:
        """All tokens [B, T, D], or those at `places_BK` alone [B, K, D]."""
        few_BKD, queries = x_BTD, None
        if places_BK is not None:
            few_BKD = take_tokens(x_BTD, places_BK)
            queries = Queries(self.attended(few_BKD), _as_array(places_BK, x_BTD))
        change_BKD = self.attention(self.attended(x_BTD), lengths_B, segments_BT, queries)
        return self.after_attention(few_BKD, change_BKD)

    def attended(self, x_BTD: Array) -> Array:
        """What attention is given of tokens."""
        return self.attention_norm(x_BTD)

    def after_attention(self, x_BTD: Array, change_BTD: Array) -> Array:
        """The rest of the block, in which tokens do not see each other."""
        if self.layer_scale:
            change_BTD = change_BTD * self.attention_scale[...].astype(x_BTD.dtype)
        x_BTD = x_BTD + change_BTD
        change_BTD = self.mlp(self.mlp_norm(x_BTD))
        if self.layer_scale:
            change_BTD = change_BTD * self.mlp_scale[...].astype(x_BTD.dtype)
        return x_BTD + change_BTD


class PostNormBlock(Block):
    """The block of the first Transformer and of BERT: each norm is after its residual sum."""

    def attended(self, x_BTD: Array) -> Array:
        return x_BTD

    def after_attention(self, x_BTD: Array, change_BTD: Array) -> Array:
        x_BTD = self.attention_norm(x_BTD + change_BTD)
        return self.mlp_norm(x_BTD + self.mlp(x_BTD))


def take_tokens(x_BTD: Array, places_BK: Array | int) -> Array:
    """The tokens at int32 places of each row, or at one that is the same for all: [B, K, D]."""
    if isinstance(places_BK, int):
        return x_BTD[:, places_BK : places_BK + 1]
    return jnp.take_along_axis(x_BTD, places_BK[:, :, None], axis=1)


def _as_array(places_BK: Array | int, x_BTD: Array) -> Array:
    return jnp.full((x_BTD.shape[0], 1), places_BK) if isinstance(places_BK, int) else places_BK


def stacked_blocks(
    config: TowerConfig,
    execution: Execution,
    *,
    is_causal: bool,
    rngs: nnx.Rngs,
    post_norm: bool = False,
) -> Block:
    """`config.depth` blocks as one module whose arrays have a leading layer axis."""
    block = PostNormBlock if post_norm else Block

    def init(key: Array) -> Block:
        return block(config, execution, is_causal=is_causal, rngs=nnx.Rngs(key))

    return jax.vmap(init)(jax.random.split(rngs.params(), config.depth))


def run_blocks(
    blocks: Block,
    x_BTD: Array,
    *,
    depth: int,
    execution: Execution,
    lengths_B: Array | None = None,
    segments_BT: Array | None = None,
) -> Array:
    """Applies stacked blocks in order, rematerialised by `execution.remat`.

    Of `execution.frozen_layers` and all before them nothing is kept for the way back.

    lengths_B: int32, real tokens of each row; padding at the end is not attended to. What the
    padding itself becomes means nothing. segments_BT: int32, tokens attend to those of the same
    number alone.
    """
    layer = _layer(execution, lengths_B, segments_BT)
    x_BTD = _run(layer, blocks, x_BTD, depth, execution.frozen_layers, execution)
    return x_BTD if execution.layout is None else execution.layout.rows(x_BTD)


def run_blocks_to_tokens(
    blocks: Block,
    x_BTD: Array,
    places_PK: Array | int,
    *,
    depth: int,
    execution: Execution,
    lengths_B: Array | None = None,
    segments_BT: Array | None = None,
) -> tuple[Array, Array]:
    """The tokens [P, K, D] that `run_blocks` would give at a few places; and all tokens [B, T, D].

    For the few, the last block makes keys and values of all tokens and the rest of the few alone:
    7% fewer FLOPs of a ViT-B. Of both results `jax.jit` computes those that are used. Where layers
    are scanned, the scan reads a copy of the weights of all but the last: on a device as many bytes
    as they have there.

    places_PK: int32, in groups of B / P rows that follow each other as one long row, where there
    are segments; without, P is B. Or one place for all rows.
    """
    B, T, D = x_BTD.shape
    first, last = _split_last(blocks)
    frozen, last_is_frozen = execution.frozen_layers, execution.frozen_layers == depth
    layer = _layer(execution, lengths_B, segments_BT)
    x_BTD = _run(layer, first, x_BTD, depth - 1, frozen, execution)
    all_BTD = _run(layer, last, x_BTD, 1, int(last_is_frozen), execution)
    P = B if isinstance(places_PK, int) else places_PK.shape[0]
    segments_PS = None
    if segments_BT is not None:  # numbered 1, 2, ... in each row
        segments_PRT = segments_BT.reshape(P, B // P, T) + (T + 1) * jnp.arange(B // P)[:, None]
        segments_PS = segments_PRT.reshape(P, -1)
    layer = _layer(execution, lengths_B, segments_PS, places_PK)
    x_PSD = x_BTD.reshape(P, -1, D)
    few_PKD = _run(layer, last, x_PSD, 1, int(last_is_frozen), execution)
    if execution.layout is None:
        return few_PKD, all_BTD
    return execution.layout.rows(few_PKD), execution.layout.rows(all_BTD)


@jax.custom_vjp
def _split_last(blocks: Block) -> tuple[Block, Block]:
    """All layers of a stack but the last, and the last, each still a stack."""
    first, last = (
        jax.tree.map(operator.itemgetter(part), blocks) for part in (slice(-1), slice(-1, None))
    )
    return first, last


def _split_last_forward(blocks: Block) -> tuple[tuple[Block, Block], None]:
    return _split_last(blocks), None


def _split_last_backward(_: None, gradients: tuple[Block, Block]) -> tuple[Block]:
    # Autodiff would add two arrays of the whole stack, each padded with zeros.
    return (jax.tree.map(lambda *parts: jnp.concatenate(parts), *gradients),)


_split_last.defvjp(_split_last_forward, _split_last_backward)


def _layer(
    execution: Execution,
    lengths_B: Array | None,
    segments_BT: Array | None,
    places_BK: Array | int | None = None,
) -> Callable[[Array, Block], Array]:
    """One block as a function of tokens and weights."""
    layout = execution.layout

    def layer(x_BTD: Array, block: Block) -> Array:
        if execution.unroll_layers:
            # Or XLA puts off weights' gradients until the end of the backward pass, and keeps for
            # each layer what they are made of. In a scan they are made in their layer anyway.
            arrays, tree = jax.tree.flatten((x_BTD, block))
            x_BTD, block = jax.tree.unflatten(tree, together(*arrays))
        if layout is not None:
            x_BTD, block = layout.rows(x_BTD), layout.whole(block, dtype=execution.dtype)
        return block(x_BTD, lengths_B, segments_BT, places_BK)

    return layer


def _rematerialised(
    layer: Callable[[Array, Block], Array], execution: Execution, *, is_scanned: bool
) -> Callable[[Array, Block], Array]:
    layout = execution.layout
    # Weights gathered for a layer are dropped after it and gathered again going backward; of those
    # of the last block, what `Attention` cuts out for queries, keys and values stays.
    if execution.remat == "none" and (layout is None or not layout.gathers):
        return layer
    # A scan keeps XLA from merging the recomputation with the forward pass.
    return jax.checkpoint(layer, policy=REMAT_POLICIES[execution.remat], prevent_cse=not is_scanned)


def _run(
    layer: Callable[[Array, Block], Array],
    blocks: Block,
    x_BTD: Array,
    num_layers: int,
    frozen: int,
    execution: Execution,
) -> Array:
    """Applies so many blocks, of which the first are frozen."""
    frozen = min(frozen, num_layers)
    for begin, end, is_frozen in ((0, frozen, True), (frozen, num_layers, False)):
        if begin == end:
            continue
        some = blocks
        if end - begin < num_layers:
            some = jax.tree.map(operator.itemgetter(slice(begin, end)), blocks)
        if is_frozen:
            some, x_BTD = jax.lax.stop_gradient((some, x_BTD))
        if end - begin == 1:
            block = jax.tree.map(operator.itemgetter(0), some)
            x_BTD = _rematerialised(layer, execution, is_scanned=False)(x_BTD, block)
            continue
        body = _rematerialised(layer, execution, is_scanned=not execution.unroll_layers)
        unroll = end - begin if execution.unroll_layers else 1
        x_BTD, _ = jax.lax.scan(_with_output(body), x_BTD, some, unroll=unroll)
    return x_BTD


def _with_output(layer: Callable[[Array, Block], Array]) -> Callable[[Array, Block], Any]:
    """As `jax.lax.scan` wants it: the next carry, and nothing to stack."""
    return lambda x_BTD, block: (layer(x_BTD, block), None)
