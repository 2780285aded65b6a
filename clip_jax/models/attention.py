"""Attention that makes its scores, by XLA: in float32, of products in the towers' dtype.

Shape suffixes: B batch, T tokens, S tokens attended to, N heads, H head width.
"""

import math

import jax
import jax.numpy as jnp

Array = jax.Array

# As far from any score as float32 has room for, and no infinity: a row that sees nothing is finite.
_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def unfused_attention(
    q_BTNH: Array,
    k_BSNH: Array,
    v_BSNH: Array,
    *,
    is_causal: bool,
    lengths_B: Array | None = None,
    segments_BS: Array | None = None,
    queries_BT: Array | None = None,
) -> Array:
    """Scaled dot-product attention [B, T, N, H] in the dtype of `v_BSNH`.

    lengths_B: int32, how many of the S keys of each row are real, at least one. segments_BS: int32,
    the same number for tokens that attend to each other. queries_BT: int32, where the queries stand
    among the keys; None: at the same places, T = S. Softmax in float32;
    `jax.nn.dot_product_attention` computes the same, but in bfloat16 multiplies the float32
    gradient of the scores with queries and keys, where here it is rounded first, as
    FlashAttention's backward pass does (Dao 2023).
    """
    T, S, width = q_BTNH.shape[1], k_BSNH.shape[1], q_BTNH.shape[-1]
    scores_BNTS = _scores(q_BTNH, k_BSNH) * (1 / math.sqrt(width))
    if segments_BS is not None:
        of_queries_BT = segments_BS
        if queries_BT is not None:
            of_queries_BT = jnp.take_along_axis(segments_BS, queries_BT, axis=1)
        same_B1TS = of_queries_BT[:, None, :, None] == segments_BS[:, None, None, :]
        scores_BNTS = jnp.where(same_B1TS, scores_BNTS, _HIDDEN)
    if is_causal:
        before = jnp.tri(T, S, dtype=bool)
        if queries_BT is not None:
            before = jnp.arange(S) <= queries_BT[:, None, :, None]
        scores_BNTS = jnp.where(before, scores_BNTS, _HIDDEN)
    if lengths_B is not None:
        real_B11S = jnp.arange(S) < lengths_B[:, None, None, None]
        scores_BNTS = jnp.where(real_B11S, scores_BNTS, _HIDDEN)
    weights_BNTS = jax.nn.softmax(scores_BNTS).astype(v_BSNH.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights_BNTS, v_BSNH)


@jax.custom_vjp
def _scores(q_BTNH: Array, k_BSNH: Array) -> Array:
    """Products of queries and keys, float32 [B, N, T, S]."""
    return jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH, preferred_element_type=jnp.float32)


def _scores_forward(q_BTNH: Array, k_BSNH: Array) -> tuple[Array, tuple[Array, Array]]:
    return _scores(q_BTNH, k_BSNH), (q_BTNH, k_BSNH)


def _scores_backward(kept: tuple[Array, Array], gradient_BNTS: Array) -> tuple[Array, Array]:
    q_BTNH, k_BSNH = kept
    gradient_BNTS = gradient_BNTS.astype(q_BTNH.dtype)
    return (
        jnp.einsum("bnts,bsnh->btnh", gradient_BNTS, k_BSNH),
        jnp.einsum("bnts,btnh->bsnh", gradient_BNTS, q_BTNH),
    )


_scores.defvjp(_scores_forward, _scores_backward)
