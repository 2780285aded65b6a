"""When gradients are made: a function that changes no number, but their order."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Array = jax.Array


@jax.custom_vjp
def together(*arrays: Array) -> tuple[Array, ...]:
    """The same arrays; of their gradients, none is passed on before all are there."""
    return arrays


def _forward(*arrays: Any) -> tuple[tuple[Array, ...], tuple[tuple[()] | None, ...]]:
    # What has no gradient, frozen weights say, is not given one by the barrier.
    return tuple(x.value for x in arrays), tuple(() if x.perturbed else None for x in arrays)


def _backward(kept: Any, gradients: Any) -> tuple[Array | None, ...]:
    has_one = [marker is not None for marker in kept]
    tied = jax.lax.optimization_barrier(
        [
            jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x
            for x in itertools.compress(gradients, has_one)
        ]
    )
    rest = iter(tied)
    return tuple(next(rest) if has else None for has in has_one)


together.defvjp(_forward, _backward, symbolic_zeros=True)
