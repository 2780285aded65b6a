"""CLIP's ResNet image tower (Radford et al. 2021, section 2.4 and released code).

It differs from He et al. 2016 in a stem of three convolutions, in strides that are average pools
(Zhang 2019: they do not alias), and in attention pooling in place of an average.

Shape suffixes: B batch, G groups of the batch, H rows, W columns, C channels, T tokens, N heads,
E embedding width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clip_jax.config import ConfigError, ImageTowerConfig
from clip_jax.config.errors import nearest_multiples
from clip_jax.models.execution import Execution
from clip_jax.models.layers import Array, attention
from clip_jax.models.vit import normalize_image

EXPANSION = 4  # channels out of a bottleneck per channel inside it (He et al. 2016)
EPSILON = 1e-5  # of batch norm, and
MOMENTUM = 0.1  # the share of the newest batch in its running statistics: torch's defaults


class BatchNorm(nnx.Module):
    """Batch norm (Ioffe & Szegedy 2015) with float32 statistics, whatever the input's type.

    `mean` and `var` are running statistics and no parameters: `nnx.BatchStat` variables, replaced
    in training by the call itself. Their `var` is unbiased (n - 1), as torch keeps it.
    """

    def __init__(self, channels: int, *, scale_init: float = 1.0) -> None:
        self.scale = nnx.Param(jnp.full((channels,), scale_init, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((channels,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((channels,), jnp.float32))

    def __call__(self, x_BHWC: Array, num_groups: int | None) -> Array:
        """num_groups: of consecutive rows, each normalised by itself; None: running statistics."""
        if num_groups is None:
            factor_C = self.scale[...] * jax.lax.rsqrt(self.var[...] + EPSILON)
            y_BHWC = (x_BHWC.astype(jnp.float32) - self.mean[...]) * factor_C + self.bias[...]
            return y_BHWC.astype(x_BHWC.dtype)
        y_BHWC, mean_GC, var_GC = normalize_by_batch(
            x_BHWC, self.scale[...], self.bias[...], num_groups
        )
        num_values = x_BHWC.size // (x_BHWC.shape[-1] * num_groups)
        unbias = num_values / max(num_values - 1, 1)
        for running, batch_GC in ((self.mean, mean_GC), (self.var, unbias * var_GC)):
            batch_C = jax.lax.stop_gradient(batch_GC.mean(axis=0))
            running[...] = (1 - MOMENTUM) * running[...] + MOMENTUM * batch_C
        return y_BHWC


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_by_batch(
    x_BHWC: Array, scale_C: Array, bias_C: Array, num_groups: int
) -> tuple[Array, Array, Array]:
    """Normalises by the statistics of groups of rows: y, and mean and biased variance [G, C].

    The gradient is written out because autodiff keeps the centred activations twice in float32,
    four times the bfloat16 input that it needs. None flows back through the two statistics.
    """
    mean_GC = _group_mean(x_BHWC.mean(axis=(1, 2), dtype=jnp.float32), num_groups)
    # Two passes: E[x^2] - E[x]^2 cancels for channels with a large mean. Within each row first:
    # short sums, the same ones on any number of devices.
    squares_BHWC = jnp.square(_centred(x_BHWC, mean_GC))
    var_GC = _group_mean(squares_BHWC.mean(axis=(1, 2)), num_groups)
    factor_GC = scale_C * jax.lax.rsqrt(var_GC + EPSILON)
    y_BHWC = _centred(x_BHWC, mean_GC) * _per_row(factor_GC, x_BHWC) + bias_C
    return y_BHWC.astype(x_BHWC.dtype), mean_GC, var_GC


def _normalize_forward(
    x_BHWC: Array, scale_C: Array, bias_C: Array, num_groups: int
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    outputs = normalize_by_batch(x_BHWC, scale_C, bias_C, num_groups)
    return outputs, (x_BHWC, scale_C, *outputs[1:])


def _normalize_backward(
    num_groups: int, saved: tuple[Array, ...], cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    x_BHWC, scale_C, mean_GC, var_GC = saved
    dy_BHWC = cotangents[0].astype(jnp.float32)
    inverse_GC = jax.lax.rsqrt(var_GC + EPSILON)
    unit_BHWC = _centred(x_BHWC, mean_GC) * _per_row(inverse_GC, x_BHWC)
    dy_BC = dy_BHWC.mean(axis=(1, 2))
    along_BC = (dy_BHWC * unit_BHWC).mean(axis=(1, 2))
    # What the group's mean and variance take away: the parts of dy along 1 and along unit.
    dy_BHWC -= _per_row(_group_mean(dy_BC, num_groups), x_BHWC)
    dy_BHWC -= unit_BHWC * _per_row(_group_mean(along_BC, num_groups), x_BHWC)
    dx_BHWC = dy_BHWC * _per_row(scale_C * inverse_GC, x_BHWC)
    num_values = x_BHWC.shape[1] * x_BHWC.shape[2]
    dscale_C, dbias_C = num_values * along_BC.sum(axis=0), num_values * dy_BC.sum(axis=0)
    return dx_BHWC.astype(x_BHWC.dtype), dscale_C, dbias_C


normalize_by_batch.defvjp(_normalize_forward, _normalize_backward)


def _group_mean(x_BC: Array, num_groups: int) -> Array:
    return x_BC.reshape(num_groups, -1, x_BC.shape[-1]).mean(axis=1)


def _per_row(x_GC: Array, like_BHWC: Array) -> Array:
    """[G, C] to [B, 1, 1, C], each group's value for each of its rows."""
    return jnp.repeat(x_GC, len(like_BHWC) // len(x_GC), axis=0)[:, None, None]


def _centred(x_BHWC: Array, mean_GC: Array) -> Array:
    return x_BHWC.astype(jnp.float32) - _per_row(mean_GC, x_BHWC)


def average_pool(x_BHWC: Array, size: int) -> Array:
    """Means of size x size pixels, without overlap."""
    B, H, W, C = x_BHWC.shape
    return x_BHWC.reshape(B, H // size, size, W // size, size, C).mean(axis=(2, 4))


def _convolution(
    channels: int, channels_out: int, size: int, execution: Execution, rngs: nnx.Rngs, **how: Any
) -> nnx.Conv:
    return nnx.Conv(
        channels,
        channels_out,
        (size, size),
        padding=size // 2,
        use_bias=False,
        # torch's default, which CLIP left as it is: uniform within +-fan_in^-0.5. Batch norm
        # makes outputs blind to it, but the step that Adam takes is relative to it.
        kernel_init=nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        dtype=execution.dtype,
        rngs=rngs,
        **how,
    )


class Stem(nnx.Module):
    """Three 3x3 convolutions and an average pool: 1 / 4 of the size."""

    def __init__(self, width: int, execution: Execution, *, rngs: nnx.Rngs) -> None:
        half = width // 2
        self.convolution_0 = _convolution(3, half, 3, execution, rngs, strides=2)
        self.norm_0 = BatchNorm(half)
        self.convolution_1 = _convolution(half, half, 3, execution, rngs)
        self.norm_1 = BatchNorm(half)
        self.convolution_2 = _convolution(half, width, 3, execution, rngs)
        self.norm_2 = BatchNorm(width)

    def __call__(self, x_BHWC: Array, num_groups: int | None) -> Array:
        x_BHWC = jax.nn.relu(self.norm_0(self.convolution_0(x_BHWC), num_groups))
        x_BHWC = jax.nn.relu(self.norm_1(self.convolution_1(x_BHWC), num_groups))
        x_BHWC = jax.nn.relu(self.norm_2(self.convolution_2(x_BHWC), num_groups))
        return average_pool(x_BHWC, 2)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; its stride is an average pool on both."""

    def __init__(
        self, channels: int, width: int, stride: int, execution: Execution, *, rngs: nnx.Rngs
    ) -> None:
        channels_out = EXPANSION * width
        self.stride = stride
        self.convolution_0 = _convolution(channels, width, 1, execution, rngs)
        self.norm_0 = BatchNorm(width)
        self.convolution_1 = _convolution(width, width, 3, execution, rngs)
        self.norm_1 = BatchNorm(width)
        self.convolution_2 = _convolution(width, channels_out, 1, execution, rngs)
        # Each block starts as its shortcut (Goyal et al. 2017, section 5.1; CLIP's code).
        self.norm_2 = BatchNorm(channels_out, scale_init=0.0)
        self.has_convolution = stride > 1 or channels != channels_out
        if self.has_convolution:
            self.shortcut_convolution = _convolution(channels, channels_out, 1, execution, rngs)
            self.shortcut_norm = BatchNorm(channels_out)

    def __call__(self, x_BHWC: Array, num_groups: int | None) -> Array:
        y_BHWC = jax.nn.relu(self.norm_0(self.convolution_0(x_BHWC), num_groups))
        y_BHWC = jax.nn.relu(self.norm_1(self.convolution_1(y_BHWC), num_groups))
        if self.stride > 1:
            x_BHWC, y_BHWC = average_pool(x_BHWC, self.stride), average_pool(y_BHWC, self.stride)
        y_BHWC = self.norm_2(self.convolution_2(y_BHWC), num_groups)
        if self.has_convolution:
            x_BHWC = self.shortcut_norm(self.shortcut_convolution(x_BHWC), num_groups)
        return jax.nn.relu(x_BHWC + y_BHWC)


class Stage(nnx.Module):
    """Bottlenecks of one width, the first with the stage's stride."""

    def __init__(
        self,
        channels: int,
        width: int,
        num_blocks: int,
        stride: int,
        execution: Execution,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_blocks = num_blocks
        for j in range(num_blocks):
            block = Bottleneck(channels, width, stride, execution, rngs=rngs)
            setattr(self, f"block_{j}", block)
            channels, stride = EXPANSION * width, 1

    def __call__(self, x_BHWC: Array, num_groups: int | None) -> Array:
        for j in range(self.num_blocks):
            x_BHWC = getattr(self, f"block_{j}")(x_BHWC, num_groups)
        return x_BHWC


class SpatialAttentionPooling(nnx.Module):
    """The mean of all tokens attends to them and itself (Radford et al. 2021, section 2.4)."""

    def __init__(
        self,
        channels: int,
        num_tokens: int,
        num_heads: int,
        embed_dim: int,
        execution: Execution,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.execution = execution
        scale = channels**-0.5  # of the embedding and of all four products, as in CLIP's code
        self.position_embedding = nnx.Param(
            scale * jax.random.normal(rngs.params(), (num_tokens + 1, channels))
        )
        heads = (num_heads, channels // num_heads)
        linear_in = functools.partial(
            nnx.LinearGeneral,
            channels,
            heads,
            kernel_init=nnx.initializers.normal(scale),
            dtype=execution.dtype,
        )
        self.query, self.key, self.value = (linear_in(rngs=rngs) for _ in range(3))
        # Full float32, as the projections of the other towers: it feeds the loss.
        self.out = nnx.LinearGeneral(
            heads,
            embed_dim,
            axis=(-2, -1),
            kernel_init=nnx.initializers.normal(scale),
            precision=jax.lax.Precision.HIGHEST,
            rngs=rngs,
        )

    def __call__(self, x_BTC: Array) -> Array:
        mean_B1C = x_BTC.mean(axis=1, dtype=jnp.float32, keepdims=True)
        # Summed in float32: so is the gradient of the position embedding, over the batch.
        x_BTC = jnp.concatenate([mean_B1C, x_BTC.astype(jnp.float32)], axis=1)
        x_BTC = (x_BTC + self.position_embedding[...]).astype(self.execution.dtype)
        pooled_B1NH = attention(
            self.query(x_BTC[:, :1]),  # CLIP's code queries with all tokens and keeps the first
            self.key(x_BTC),
            self.value(x_BTC),
            is_causal=False,
            execution=self.execution,
        )
        return self.out(pooled_B1NH.astype(jnp.float32))[:, 0]


class ModifiedResNet(nnx.Module):
    """Images to embeddings [B, E] (float32) and the last feature map as tokens [B, T, C].

    T is (image_size / 32)^2, C is 32 x `config.width`. It has no remat of its own, and `depth`,
    `mlp_ratio` and the options of Transformers are not used.
    """

    def __init__(
        self, config: ImageTowerConfig, execution: Execution, *, embed_dim: int, rngs: nnx.Rngs
    ) -> None:
        self.config, self.execution = config, execution
        self.stem = Stem(config.width, execution, rngs=rngs)
        channels = config.width
        for i in range(4):
            width, stride = config.width * 2**i, 1 if i == 0 else 2
            stage = Stage(channels, width, config.resnet_layers[i], stride, execution, rngs=rngs)
            setattr(self, f"stage_{i}", stage)
            channels = EXPANSION * width
        num_tokens = (config.image_size // config.patch_size) ** 2
        self.pooling = SpatialAttentionPooling(
            channels, num_tokens, config.num_heads, embed_dim, execution, rngs=rngs
        )

    def __call__(
        self, image_BHWC: Array, *, row_keys_B: Array | None = None
    ) -> tuple[Array, Array]:
        """image_BHWC: uint8, or float normalised. row_keys_B: not None where this is training.

        Training normalises by the statistics of the batch and replaces the running ones (`mean`,
        `var`): read them from the module in the same trace. Raises ConfigError where the groups of
        'local' batch norm do not divide the rows.
        """
        num_groups = None if row_keys_B is None else self._num_groups(len(image_BHWC))
        layout = self.execution.layout
        if layout is not None:  # convolutions are not split over the tensor axis: rows are
            image_BHWC = layout.all_rows(image_BHWC)
        image_BHWC = normalize_image(image_BHWC, self.config).astype(self.execution.dtype)
        x_BHWC = self.stem(image_BHWC, num_groups)
        for i in range(4):
            x_BHWC = getattr(self, f"stage_{i}")(x_BHWC, num_groups)
        x_BTC = x_BHWC.reshape(x_BHWC.shape[0], -1, x_BHWC.shape[-1])
        if layout is not None:
            x_BTC = layout.rows(x_BTC)
        return self.pooling(x_BTC), x_BTC

    def _num_groups(self, num_rows: int) -> int:
        if self.config.batch_norm == "global":
            return 1
        size = self.config.batch_norm_group_size
        if num_rows % size:
            raise ConfigError(
                f"config.model.image.batch_norm_group_size {size} does not divide the {num_rows} "
                f"rows of a microbatch; nearest number of rows: {nearest_multiples(num_rows, size)}"
            )
        return num_rows // size
