"""Blocks that both towers are made of.

Shape suffixes: B batch, T tokens, D model width, N heads, H head width, F MLP width.
Modules hold float32 parameters and do arithmetic in `Execution.dtype`; they hold no random state.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from clip_jax.config import ConfigError, ImageTowerConfig, TextTowerConfig

Array = jax.Array
TowerConfig = ImageTowerConfig | TextTowerConfig

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # Hendrycks & Gimpel 2016, section 2
}

REMAT_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How the towers compute: nothing here changes what they compute, beyond rounding."""

    dtype: Any = jnp.float32
    remat: Literal["none", "dots", "full"] = "none"
    unroll_layers: bool = False  # GPUs copy the carry of a scan; CPUs and TPUs run scans faster
    attention: Literal["xla", "cudnn"] = "xla"

    @classmethod
    def for_backend(
        cls, backend: str, *, precision: str = "float32", remat: str = "none"
    ) -> "Execution":
        """What to use on `backend` ('cpu', 'gpu', 'tpu')."""
        if remat not in ("none", *REMAT_POLICIES):
            raise ConfigError(f"unknown remat policy {remat!r}")
        on_gpu = backend in ("gpu", "cuda")
        low_precision = precision == "bfloat16"
        return cls(
            dtype=jnp.dtype(precision),
            remat=remat,  # type: ignore[arg-type]  # checked just above
            unroll_layers=on_gpu,
            attention="cudnn" if on_gpu and low_precision else "xla",
        )


def attention(
    q_BTNH: Array, k_BSNH: Array, v_BSNH: Array, *, is_causal: bool, execution: Execution
) -> Array:
    """Scaled dot-product attention [B, T, N, H]: the one entry point, softmax in float32."""
    # cuDNN takes 16-bit inputs with head widths that are multiples of 8 and raises on others.
    fused = execution.attention == "cudnn" and q_BTNH.shape[-1] % 8 == 0
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSNH, v_BSNH, is_causal=is_causal, implementation="cudnn" if fused else "xla"
    )


def layer_norm(config: TowerConfig, execution: Execution, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm with float32 statistics."""
    # use_fast_variance computes E[x^2] - E[x]^2, which cancels for features with a large mean.
    return nnx.LayerNorm(
        config.width,
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
        # Standard deviations: Radford et al. 2021 (CLIP), released code.
        self.qkv = nnx.LinearGeneral(
            config.width,
            (3, config.num_heads, head_width),
            kernel_init=nnx.initializers.normal(config.width**-0.5),
            dtype=execution.dtype,
            rngs=rngs,
        )
        self.out = nnx.LinearGeneral(
            (config.num_heads, head_width),
            config.width,
            axis=(-2, -1),
            kernel_init=nnx.initializers.normal((config.width * 2 * config.depth) ** -0.5),
            dtype=execution.dtype,
            rngs=rngs,
        )

    def __call__(self, x_BTD: Array) -> Array:
        qkv_BT3NH = self.qkv(x_BTD)
        q_BTNH, k_BTNH, v_BTNH = (qkv_BT3NH[:, :, i] for i in range(3))
        mixed_BTNH = attention(
            q_BTNH, k_BTNH, v_BTNH, is_causal=self.is_causal, execution=self.execution
        )
        return self.out(mixed_BTNH)


class MLP(nnx.Module):
    """Two linear layers with a nonlinearity between them."""

    def __init__(self, config: TowerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        hidden = round(config.width * config.mlp_ratio)
        self.activation = config.activation
        self.up = nnx.Linear(
            config.width,
            hidden,
            kernel_init=nnx.initializers.normal((2 * config.width) ** -0.5),
            dtype=execution.dtype,
            rngs=rngs,
        )
        self.down = nnx.Linear(
            hidden,
            config.width,
            kernel_init=nnx.initializers.normal((config.width * 2 * config.depth) ** -0.5),
            dtype=execution.dtype,
            rngs=rngs,
        )

    def __call__(self, x_BTD: Array) -> Array:
        hidden_BTF = ACTIVATIONS[self.activation](self.up(x_BTD))
        return self.down(hidden_BTF)


class Block(nnx.Module):
    """Pre-norm Transformer block."""

    def __init__(
        self, config: TowerConfig, execution: Execution, *, is_causal: bool, rngs: nnx.Rngs
    ) -> None:
        self.attention_norm = layer_norm(config, execution, rngs=rngs)
        self.attention = Attention(config, execution, is_causal=is_causal, rngs=rngs)
        self.mlp_norm = layer_norm(config, execution, rngs=rngs)
        self.mlp = MLP(config, execution, rngs=rngs)

    def __call__(self, x_BTD: Array) -> Array:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


def stacked_blocks(
    config: TowerConfig, execution: Execution, *, is_causal: bool, rngs: nnx.Rngs
) -> Block:
    """`config.depth` blocks as one module whose arrays have a leading layer axis."""

    def init(key: Array) -> Block:
        return Block(config, execution, is_causal=is_causal, rngs=nnx.Rngs(key))

    return jax.vmap(init)(jax.random.split(rngs.params(), config.depth))


def run_blocks(blocks: Block, x_BTD: Array, *, depth: int, execution: Execution) -> Array:
    """Applies stacked blocks in order, rematerialised by `execution.remat`."""

    def body(x_BTD: Array, block: Block) -> tuple[Array, None]:
        return block(x_BTD), None

    if execution.remat != "none":
        # The scan already keeps XLA from merging the recomputation with the forward pass.
        body = jax.checkpoint(
            body, policy=REMAT_POLICIES[execution.remat], prevent_cse=execution.unroll_layers
        )
    unroll = depth if execution.unroll_layers else 1
    x_BTD, _ = jax.lax.scan(body, x_BTD, blocks, unroll=unroll)
    return x_BTD
