"""Blocks that the Transformer towers are made of.

Shape suffixes: B batch, T tokens, S tokens attended to, D model width, N heads, H head width,
F MLP width.
Modules hold float32 parameters and do arithmetic in `Execution.dtype`; they hold no random state.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from clip_jax.config import ConfigError, ImageTowerConfig, TextTowerConfig
from clip_jax.models.activations import ACTIVATIONS
from clip_jax.models.attention import unfused_attention
from clip_jax.models.gradients import together

Array = jax.Array
TowerConfig = ImageTowerConfig | TextTowerConfig


def _all_but_gathered_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: what `Layout.whole` makes is gathered again going backward."""
    # It is a custom_vjp whose body pins shardings; cuDNN's attention is another, to be kept.
    gathers = primitive.name.startswith("custom_vjp_call") and "sharding_constraint" in str(
        params.get("call_jaxpr")
    )
    return not gathers and bool(primitive.name != "sharding_constraint")


REMAT_POLICIES: dict[str, Any] = {
    "none": _all_but_gathered_weights,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


class Layout(Protocol):
    """Where arrays lie while a tower computes; `clip_jax.parallel.Layout` is one."""

    @property
    def gathers(self) -> bool:
        """Whether weights are split, and gathered by `whole` for each use."""
        ...

    def rows(self, x_B: Array) -> Array: ...

    def all_rows(self, x_B: Array) -> Array: ...

    def look_up(self, table_VD: Array, tokens_B: Array) -> Array: ...

    def whole(self, tree: Any, *, dtype: Any = None) -> Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How the towers compute: nothing here changes what they compute, beyond rounding."""

    dtype: Any = jnp.float32
    remat: Literal["none", "dots", "full", "offload"] = "none"
    unroll_layers: bool = False  # GPUs copy the carry of a scan; CPUs and TPUs run scans faster
    attention: Literal["xla", "cudnn"] = "xla"
    # XLA's CPU backend lays convolutions out for its fast kernels outside of loops alone: inside,
    # the forward and backward pass of a stem takes 20 times as long (jax 0.10.2).
    convolve_in_loops: bool = True
    # It also turns the tokens' arrays and the weights around, in memory, where a product has more
    # axes than two. Split weights are better left as they are.
    flat_products: bool = False
    frozen_layers: int = 0  # so many blocks, and what comes before them, get no gradients
    layout: Layout | None = None  # None: on one device, or as XLA's partitioner sees fit

    @classmethod
    def for_backend(
        cls,
        backend: str,
        *,
        precision: str = "float32",
        remat: str = "none",
        layers: str = "auto",
        layout: Layout | None = None,
        device: Any = None,
    ) -> "Execution":
        """What to use on `backend` ('cpu', 'gpu', 'tpu'). Raises ConfigError on unknown names.

        device: one of JAX's, whose kernels are asked for; None: of a GPU, those of Ampere or later.
        """
        if remat not in REMAT_POLICIES:
            raise ConfigError(
                f"unknown remat policy {remat!r}; there are {', '.join(REMAT_POLICIES)}"
            )
        if layers not in ("auto", "scan", "unroll"):
            raise ConfigError(f"config.layers is {layers!r}; there are auto, scan, unroll")
        on_gpu = backend in ("gpu", "cuda")
        fuses = on_gpu and precision == "bfloat16" and _has_cudnn_attention(device)
        # Unrolled, offloading frees little: four layers of ViT-B/32's towers, 2,048 pairs on an
        # H100, need 12.5 GB with 'dots' and 11.7 with 'offload'; scanned 7.2 with 'offload'.
        unrolls = on_gpu and remat != "offload"
        return cls(
            dtype=jnp.dtype(precision),
            remat=remat,  # type: ignore[arg-type]  # checked just above
            unroll_layers=layers == "unroll" or (layers == "auto" and unrolls),
            attention="cudnn" if fuses else "xla",
            convolve_in_loops=backend != "cpu",
            flat_products=backend == "cpu",
            layout=layout,
        )


def _has_cudnn_attention(device: Any) -> bool:
    """NVIDIA's GPUs have it since Ampere, 8.0. AMD's give an architecture there: 'gfx942'."""
    major = getattr(device, "compute_capability", "8.0").split(".")[0]
    return bool(major.isdigit() and int(major) >= 8)


def attention(
    q_BTNH: Array,
    k_BSNH: Array,
    v_BSNH: Array,
    *,
    is_causal: bool,
    execution: Execution,
    lengths_B: Array | None = None,
    segments_BT: Array | None = None,
) -> Array:
    """Scaled dot-product attention [B, T, N, H]: the one entry point, softmax in float32.

    lengths_B: int32, how many of the S keys of each row are real; the rest, at the end, are
    padding that nothing attends to. None: all are real. A row without a real key attends to its
    first one: finite, in the backward pass too.
    segments_BT: int32, the same number for tokens that attend to each other, of T = S; so all
    attend to themselves at least. Always by XLA: cuDNN would add a mask as a bias of [B, T, T],
    for even T alone (CLIP's is 77), and packed rows are a fraction of those it is meant to save.
    """
    if lengths_B is not None:
        lengths_B = jnp.maximum(lengths_B, 1).astype(jnp.int32)
    # cuDNN takes 16-bit inputs with head widths that are multiples of 8 and raises on others.
    if execution.attention == "xla" or q_BTNH.shape[-1] % 8 or segments_BT is not None:
        return unfused_attention(
            q_BTNH,
            k_BSNH,
            v_BSNH,
            is_causal=is_causal,
            lengths_B=lengths_B,
            segments_BT=segments_BT,
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
        self, x_BTD: Array, lengths_B: Array | None = None, segments_BT: Array | None = None
    ) -> Array:
        qkv_BT3NH = self.qkv(x_BTD)
        q_BTNH, k_BTNH, v_BTNH = (qkv_BT3NH[:, :, i] for i in range(3))
        if self.qk_norm:
            q_BTNH, k_BTNH = self.query_norm(q_BTNH), self.key_norm(k_BTNH)
        mixed_BTNH = attention(
            q_BTNH,
            k_BTNH,
            v_BTNH,
            is_causal=self.is_causal,
            execution=self.execution,
            lengths_B=lengths_B,
            segments_BT=segments_BT,
        )
        return self.out(mixed_BTNH)


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
        self, x_BTD: Array, lengths_B: Array | None = None, segments_BT: Array | None = None
    ) -> Array:
        change_BTD = self.attention(self.attention_norm(x_BTD), lengths_B, segments_BT)
        if self.layer_scale:
            change_BTD = change_BTD * self.attention_scale[...].astype(x_BTD.dtype)
        x_BTD = x_BTD + change_BTD
        change_BTD = self.mlp(self.mlp_norm(x_BTD))
        if self.layer_scale:
            change_BTD = change_BTD * self.mlp_scale[...].astype(x_BTD.dtype)
        return x_BTD + change_BTD


class PostNormBlock(Block):
    """The block of the first Transformer and of BERT: each norm is after its residual sum."""

    def __call__(
        self, x_BTD: Array, lengths_B: Array | None = None, segments_BT: Array | None = None
    ) -> Array:
        x_BTD = self.attention_norm(x_BTD + self.attention(x_BTD, lengths_B, segments_BT))
        return self.mlp_norm(x_BTD + self.mlp(x_BTD))


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

    layout = execution.layout

    def body(x_BTD: Array, block: Block) -> tuple[Array, None]:
        if execution.unroll_layers:
            # Or XLA puts off weights' gradients until the end of the backward pass, and keeps for
            # each layer what they are made of. In a scan they are made in their layer anyway.
            arrays, tree = jax.tree.flatten((x_BTD, block))
            x_BTD, block = jax.tree.unflatten(tree, together(*arrays))
        if layout is not None:
            x_BTD, block = layout.rows(x_BTD), layout.whole(block, dtype=execution.dtype)
        return block(x_BTD, lengths_B, segments_BT), None

    # Weights gathered for a layer are dropped after it and gathered again going backward.
    if execution.remat != "none" or (layout is not None and layout.gathers):
        # The scan already keeps XLA from merging the recomputation with the forward pass.
        body = jax.checkpoint(
            body, policy=REMAT_POLICIES[execution.remat], prevent_cse=execution.unroll_layers
        )

    def run(x_BTD: Array, blocks: Block, num_layers: int) -> Array:
        unroll = num_layers if execution.unroll_layers else 1
        return jax.lax.scan(body, x_BTD, blocks, unroll=unroll)[0]

    frozen = execution.frozen_layers
    if frozen:
        first, blocks = (
            jax.tree.map(lambda leaf, part=part: leaf[part], blocks)
            for part in (slice(frozen), slice(frozen, None))
        )
        x_BTD = jax.lax.stop_gradient(run(x_BTD, jax.lax.stop_gradient(first), frozen))
    if frozen < depth:
        x_BTD = run(x_BTD, blocks, depth - frozen)
    return x_BTD if layout is None else layout.rows(x_BTD)
