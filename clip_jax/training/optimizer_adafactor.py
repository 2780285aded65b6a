"""Adafactor's second moments, factored matrix by matrix of stacked layers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clip_jax.training.rates import is_stacked, map_with_path

Array = jax.Array

# Zhai et al. 2022 (Scaling Vision Transformers), section 3.4, and big_vision's scale_by_adafactor.
_SMALLEST_TO_FACTOR = 32
_EXPONENT = 0.8  # of the decay's way to its highest value
_EPSILON = 1e-30  # added to squares


class AdafactorState(NamedTuple):
    count: Array  # type: ignore[assignment]  # optax calls it so: int32, updates done
    nu: Any  # of each array its second moment, or {"row": ..., "column": ...}


def scale_by_adafactor(*, highest_decay: float) -> optax.GradientTransformation:
    """Gradients over the root of their factored mean squares (Shazeer & Stern 2018, algorithm 4).

    Of a matrix means over its longer side (row) and over its shorter one (column) are kept,
    float32, where the shorter is at least 32. Layers of stacked blocks, and q, k and v of one
    kernel, are matrices of their own: the same numbers as in big_vision, where they are arrays of
    their own. highest_decay: of the moments, min(highest_decay, 1 - count^-0.8), as there.
    """

    def init(params: Any) -> AdafactorState:
        def zeros(path: str, param: Array) -> Any:
            axes = factored_axes(path, param.shape)
            if axes is None:
                return jnp.zeros(param.shape, jnp.float32)
            return {
                name: jnp.zeros(_without(param.shape, axis), jnp.float32)
                for name, axis in zip(("column", "row"), axes, strict=True)
            }

        return AdafactorState(jnp.zeros((), jnp.int32), map_with_path(zeros, params))

    def update(
        gradients: Any, state: AdafactorState, params: Any = None
    ) -> tuple[Any, AdafactorState]:
        count = optax.safe_increment(state.count)
        decay = jnp.minimum(highest_decay, 1 - count.astype(jnp.float32) ** -_EXPONENT)

        def new_moment(path: str, gradient: Array, moment: Any) -> Any:
            squares = jnp.square(gradient.astype(jnp.float32)) + _EPSILON
            axes = factored_axes(path, gradient.shape)
            if axes is None:
                return decay * moment + (1 - decay) * squares
            return {
                name: decay * moment[name] + (1 - decay) * squares.mean(axis)
                for name, axis in zip(("column", "row"), axes, strict=True)
            }

        def scaled(path: str, gradient: Array, moment: Any) -> Array:
            axes = factored_axes(path, gradient.shape)
            if axes is None:
                return gradient * jax.lax.rsqrt(moment)
            shorter, longer = axes
            row = jnp.expand_dims(moment["row"], longer)
            column = jnp.expand_dims(moment["column"], shorter)
            row = row / row.mean(shorter, keepdims=True)
            return gradient * jax.lax.rsqrt(row) * jax.lax.rsqrt(column)

        nu = map_with_path(new_moment, gradients, state.nu)
        return map_with_path(scaled, gradients, nu), AdafactorState(count, nu)

    return optax.GradientTransformation(init, update)


def factored_axes(path: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The second longest and the longest axis of a matrix; None where it is not factored.

    The axis of layers is not among them, nor is that of q, k and v, which is too short.
    """
    axes = range(1 if is_stacked(path) else 0, len(shape))
    by_length = sorted(axes, key=lambda axis: shape[axis])
    if len(by_length) < 2 or shape[by_length[-2]] < _SMALLEST_TO_FACTOR:
        return None
    return by_length[-2], by_length[-1]


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]
