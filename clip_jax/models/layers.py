"""Parts that the blocks of the Transformer towers are made of.

Shape suffixes: B batch, T tokens, S tokens attended to, D model width, N heads, H head width,
F MLP width.
Modules hold float32 parameters and do arithmetic in `Execution.dtype`; they hold no random state.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from clip_jax.config import ImageTowerConfig, TextTowerConfig
from clip_jax.models.activations import ACTIVATIONS
from clip_jax.models.attention import unfused_attention
from clip_jax.models.execution import Execution

Array = jax.Array
TowerConfig = ImageTowerConfig | TextTowerConfig


def attention(
    q_BTNH: Array,
    k_BSNH: Array,
    v_BSNH: Array,
    *,
    is_causal: bool,
    execution: Execution,
    lengths_B: Array | None = None,
    segments_BS: Array | None = None,
    queries_BT: Array | None = None,
) -> Array:
    """Scaled dot-product attention [B, T, N, H]: the one entry point, softmax in float32.

    lengths_B: int32, how many of the S keys of each row are real; the rest, at the end, are
    padding that nothing attends to. None: all are real. A row without a real key attends to its
    first one: finite, in the backward pass too.
    segments_BS: int32, the same number for tokens that attend to each other, so all attend to
    themselves at least. Always by XLA: cuDNN would add a mask as a bias of [B, T, T], for even T
    alone (CLIP's is 77), and packed rows are a fraction of those it is meant to save.
    queries_BT: int32, where a few queries stand among the keys; None: T = S. Always by XLA: their
    scores are few.
    """
    if lengths_B is not None:
        lengths_B = jnp.maximum(lengths_B, 1).astype(jnp.int32)
    # cuDNN takes 16-bit inputs with head widths that are multiples of 8 and raises on others.
    fuses = execution.attention == "cudnn" and q_BTNH.shape[-1] % 8 == 0
    if not fuses or segments_BS is not None or queries_BT is not None:
        return unfused_attention(
            q_BTNH,
            k_BSNH,
            v_BSNH,
            is_causal=is_causal,
            lengths_B=lengths_B,
            segments_BS=segments_BS,
            queries_BT=queries_BT,
        )
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSNH,
        v_BSNH,
        is_causal=is_causal,
        # Not a mask: cuDNN would turn it into a bias, which needs even lengths.
        key_value_seq_lengths=lengths_B,
        implementation="cudnn",
    )


def products(execution: Execution) -> Callable[..., Array]:
    """`jax.lax.dot_general`, or one for last axes of the input and first ones of the weights."""
    flat = execution.flat_products and execution.layout is None
    return _flat_dot_general if flat else jax.lax.dot_general


def _flat_dot_general(x: Array, weights: Array, axes: Any, **options: Any) -> Array:
    """As a product of two matrices, of the same numbers as lie in memory."""
    (x_axes, weight_axes), batch = axes
    count = len(x_axes)
    last, first = tuple(range(x.ndim - count, x.ndim)), tuple(range(count))
    assert (tuple(x_axes), tuple(weight_axes), batch) == (last, first, ((), ()))
    x_MK = x.reshape(-1, math.prod(x.shape[-count:]))
    weights_KN = weights.reshape(x_MK.shape[1], -1)
    out_MN = jax.lax.dot_general(x_MK, weights_KN, (((1,), (0,)), ((), ())), **options)
    return out_MN.reshape(*x.shape[:-count], *weights.shape[count:])


def look_up(table_VD: Array, tokens_B: Array, execution: Execution) -> Array:
    """Rows of a table of embeddings [V, D] for integers [B, ...]: [B, ..., D]."""
    if execution.layout is None:
        return table_VD[tokens_B]
    return execution.layout.look_up(table_VD, tokens_B)


def layer_norm(
    config: TowerConfig, execution: Execution, *, rngs: nnx.Rngs, width: int | None = None
) -> nnx.LayerNorm:
    """Layer norm with float32 statistics, over the tower's width or another one."""
    # use_fast_variance computes E[x^2] - E[x]^2, which cancels for features with a large mean.
    return nnx.LayerNorm(
        width or config.width,
        epsilon=config.layer_norm_epsilon,
        use_fast_variance=False,
        dtype=execution.dtype,
        rngs=rngs,
    )


class Queries(NamedTuple):
    """A few tokens of each row, and where they stand in it."""

    tokens: Array  # [B, K, D], normed where the block norms before its attention
    places: Array  # int32 [B, K]


class Attention(nnx.Module):
    """Multi-head self-attention with one fused query-key-value product."""

    def __init__(
        self, config: TowerConfig, execution: Execution, *, is_causal: bool, rngs: nnx.Rngs
    ) -> None:
        head_width = config.width // config.num_heads
        self.is_causal, self.execution = is_causal, execution
        self.qk_norm = isinstance(config, ImageTowerConfig) and config.qk_norm
        # Standard deviations: Radford et al. 2021 (CLIP), released code.
        self.qkv = nnx.LinearGeneral(
            config.width,
            (3, config.num_heads, head_width),
            kernel_init=nnx.initializers.normal(config.width**-0.5),
            dtype=execution.dtype,
            dot_general=products(execution),
            rngs=rngs,
        )
        if self.qk_norm:  # one norm for all heads: Dehghani et al. 2023, section 2
            self.query_norm = layer_norm(config, execution, rngs=rngs, width=head_width)
            self.key_norm = layer_norm(config, execution, rngs=rngs, width=head_width)
        self.out = nnx.LinearGeneral(
            (config.num_heads, head_width),
            config.width,
            axis=(-2, -1),
            kernel_init=nnx.initializers.normal((config.width * 2 * config.depth) ** -0.5),
            dtype=execution.dtype,
            dot_general=products(execution),
            rngs=rngs,
        )

    def __call__(
        self,
        x_BTD: Array,
        lengths_B: Array | None = None,
        segments_BT: Array | None = None,
        queries: Queries | None = None,
    ) -> Array:
        """Of all tokens [B, T, D], or of `queries` alone [B, K, D]."""
        if queries is None:
            places_BK = None
            q_BTNH, k_BTNH, v_BTNH = jnp.unstack(self.qkv(x_BTD), axis=2)
        else:
            few_BKD, places_BK = queries
            (q_BTNH,) = self._project(few_BKD, slice(1))
            k_BTNH, v_BTNH = self._project(x_BTD, slice(1, 3))
        if self.qk_norm:
            q_BTNH, k_BTNH = self.query_norm(q_BTNH), self.key_norm(k_BTNH)
        mixed_BTNH = attention(
            q_BTNH,
            k_BTNH,
            v_BTNH,
            is_causal=self.is_causal,
            execution=self.execution,
            lengths_B=lengths_B,
            segments_BS=segments_BT,
            queries_BT=places_BK,
        )
        return self.out(mixed_BTNH)

    def _project(self, x_BTD: Array, parts: slice) -> tuple[Array, ...]:
        """Some of queries, keys and values: [B, T, N, H] of each."""
        dtype = self.execution.dtype
        kernel_DpNH = self.qkv.kernel[...][:, parts].astype(dtype)
        bias_pNH = self.qkv.bias[...][parts].astype(dtype)  # type: ignore[index]  # has one
        dot_general = products(self.execution)
        out_BTpNH = dot_general(x_BTD.astype(dtype), kernel_DpNH, (((2,), (0,)), ((), ())))
        return jnp.unstack(out_BTpNH + bias_pNH, axis=2)


class MLP(nnx.Module):
    """Two linear layers with a nonlinearity between them; 'swiglu' has a third, the gate."""

    def __init__(self, config: TowerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        hidden = round(config.width * config.mlp_ratio)
        self.activation = config.activation
        # Standard deviations: Radford et al. 2021 (CLIP), released code.
        linear_in = functools.partial(
            nnx.Linear,
            config.width,
            hidden,
            kernel_init=nnx.initializers.normal((2 * config.width) ** -0.5),
            dtype=execution.dtype,
            dot_general=products(execution),
        )
        self.up = linear_in(rngs=rngs)
        if self.activation == "swiglu":
            self.gate = linear_in(rngs=rngs)
        self.down = nnx.Linear(
            hidden,
            config.width,
            kernel_init=nnx.initializers.normal((config.width * 2 * config.depth) ** -0.5),
            dtype=execution.dtype,
            dot_general=products(execution),
            rngs=rngs,
        )

    def __call__(self, x_BTD: Array) -> Array:
        hidden_BTF, activation = self.up(x_BTD), ACTIVATIONS[self.activation]
        if self.activation == "swiglu":
            return self.down(activation(self.gate(x_BTD)) * hidden_BTF)
        return self.down(activation(hidden_BTF))
