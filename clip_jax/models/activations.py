"""Nonlinearities of the MLPs, with derivatives that keep little for the backward pass.

Differentiated term by term, `gelu` keeps four arrays of its input's size for the way back, and
`gelu_tanh` more. Here a rule gives the derivative as a whole, which is the one array kept. Both are
computed in float32, whatever the input: in bfloat16, 1 + erf(-2) has two digits. The derivative is
kept in the input's dtype, so a gradient in bfloat16 is rounded twice, there and in the product with
what comes from above; PyTorch keeps the input and rounds once. That is 2^-8 of it at most.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
Function = Callable[[Array], Array]

_ROOT_HALF, _ROOT_TWO_OVER_PI = math.sqrt(0.5), math.sqrt(2 / math.pi)
_CUBIC = 0.044715  # Hendrycks & Gimpel 2016, section 2
_QUICK = 1.702  # the same


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + jax.lax.erf(x * _ROOT_HALF))


def _gelu_derivative(x: Array) -> Array:
    density = 0.5 * _ROOT_TWO_OVER_PI * jnp.exp(-0.5 * x * x)  # of the standard normal
    return 0.5 * (1 + jax.lax.erf(x * _ROOT_HALF)) + x * density


def _gelu_tanh(x: Array) -> Array:  # (1 + tanh(u)) / 2 = sigmoid(2 u)
    return x * jax.nn.sigmoid(2 * _ROOT_TWO_OVER_PI * (x + _CUBIC * x * x * x))


def _gelu_tanh_derivative(x: Array) -> Array:
    x = jnp.clip(x, -20, 20)  # where it is 0 and 1, and no power overflows
    gate = jax.nn.sigmoid(2 * _ROOT_TWO_OVER_PI * (x + _CUBIC * x * x * x))
    slope = 2 * _ROOT_TWO_OVER_PI * (1 + 3 * _CUBIC * x * x)
    return gate + x * slope * gate * (1 - gate)


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(_QUICK * x)


def _quick_gelu_derivative(x: Array) -> Array:
    gate = jax.nn.sigmoid(_QUICK * x)
    return gate + _QUICK * x * gate * (1 - gate)


def _silu(x: Array) -> Array:
    return x * jax.nn.sigmoid(x)


def _silu_derivative(x: Array) -> Array:
    gate = jax.nn.sigmoid(x)
    return gate + x * gate * (1 - gate)


def _with_derivative(function: Function, derivative: Function) -> Function:
    """`function` of [...], in the input's dtype, whose derivative is `derivative`."""

    @jax.custom_jvp
    def activation(x: Array) -> Array:
        return function(x.astype(jnp.float32)).astype(x.dtype)

    @activation.defjvp
    def tangent(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        (x,), (dx,) = primals, tangents
        return activation(x), derivative(x.astype(jnp.float32)).astype(x.dtype) * dx

    return activation


ACTIVATIONS: dict[str, Function] = {
    "gelu": _with_derivative(_gelu, _gelu_derivative),
    "gelu_tanh": _with_derivative(_gelu_tanh, _gelu_tanh_derivative),
    "quick_gelu": _with_derivative(_quick_gelu, _quick_gelu_derivative),
    # Of the gate (Shazeer 2020); the others are of `up` itself.
    "swiglu": _with_derivative(_silu, _silu_derivative),
}
