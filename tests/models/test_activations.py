"""The nonlinearities against PyTorch's, and what their derivatives keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models.activations import ACTIVATIONS

torch = pytest.importorskip("torch")
THEIRS = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "swiglu": torch.nn.functional.silu,
}
INPUTS = np.linspace(-12, 12, 4001, dtype=np.float32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_derivatives_are_pytorchs(name):
    x = torch.tensor(INPUTS, dtype=torch.float64, requires_grad=True)
    theirs = THEIRS[name](x)
    theirs.sum().backward()
    ours = ACTIVATIONS[name](INPUTS)
    derivative = jax.vmap(jax.grad(ACTIVATIONS[name]))(INPUTS)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(derivative, x.grad.numpy(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_bfloat16_is_rounded_once(name):
    x = jnp.asarray(INPUTS, jnp.bfloat16)
    value, derivative = ACTIVATIONS[name](x), jax.vmap(jax.grad(ACTIVATIONS[name]))(x)
    exact = ACTIVATIONS[name](x.astype(jnp.float32))
    assert value.dtype == derivative.dtype == jnp.bfloat16
    np.testing.assert_array_equal(value, exact.astype(jnp.bfloat16))
    exact = jax.vmap(jax.grad(ACTIVATIONS[name]))(x.astype(jnp.float32))
    np.testing.assert_array_equal(derivative, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_one_array_is_kept_for_the_way_back(name):
    _, back = jax.vjp(ACTIVATIONS[name], INPUTS)
    kept = [leaf.size for leaf in jax.tree.leaves(back)]
    assert sum(kept) == INPUTS.size


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("extreme", [-1e30, 1e30, -0.0, 0.0])
def test_far_out_it_stays_finite(name, extreme):
    value, derivative = jax.value_and_grad(ACTIVATIONS[name])(jnp.float32(extreme))
    assert jnp.isfinite(value)
    assert jnp.isfinite(derivative)
    assert float(derivative) == pytest.approx(float(extreme > 0) if extreme else 0.5, abs=1e-6)
