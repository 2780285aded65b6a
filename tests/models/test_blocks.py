"""A few tokens of the last block, against those of all its tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clip_jax.config import ImageTowerConfig, TextTowerConfig
from clip_jax.models import Execution
from clip_jax.models.blocks import run_blocks, run_blocks_to_tokens, stacked_blocks, take_tokens

IMAGE = ImageTowerConfig(
    width=32, depth=3, num_heads=2, activation="swiglu", qk_norm=True, layer_scale_init=0.5
)
TEXT = TextTowerConfig(width=32, depth=3, num_heads=2)
B, T = 6, 7
# Three captions in two rows, then in two more; 0 is padding.
SEGMENTS = np.array(
    [[1, 1, 1, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 0, 0]]
)
ENDS = np.array([[2, 5, 8], [6, 8, 11]])  # in groups of two rows


def tokens(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


CASES = {
    "class token": (IMAGE, B, 0, {}, {}),
    "the last": (TEXT, B, T - 1, {"is_causal": True}, {}),
    "end of text": (TEXT, B, np.array([[3], [6], [0], [2], [5], [1]]), {"is_causal": True}, {}),
    "lengths, norms last": (
        TEXT,
        B,
        0,
        {"is_causal": False, "post_norm": True},
        {"lengths_B": np.array([5, 7, 1, 2, 3, 4])},
    ),
    "packed": (TEXT, 4, ENDS, {"is_causal": True}, {"segments_BT": SEGMENTS}),
}


EXECUTIONS = {
    "scanned": Execution(flat_products=True),
    "dots, all but the last frozen": Execution(remat="dots", frozen_layers=2),
    "unrolled": Execution(unroll_layers=True, remat="full", frozen_layers=1),
}


def both(case, execution, depth):
    """Outputs and gradients by `run_blocks_to_tokens`, then by `run_blocks`."""
    config, num_rows, places, options, what = CASES[case]
    config = dataclasses.replace(config, depth=depth)
    blocks = stacked_blocks(
        config, execution, **{"is_causal": False, "rngs": nnx.Rngs(0)} | options
    )
    up = tokens(2, 3, 32) if case == "packed" else tokens(B, 1, 32)
    x = tokens(num_rows, T, 32)
    what = {name: jnp.asarray(value) for name, value in what.items()}
    same = {"depth": depth, "execution": execution} | what

    def whole(blocks, x):
        y = run_blocks(blocks, x, **same)
        return take_tokens(y.reshape(len(up), -1, 32), places), y

    def few(blocks, x):
        return run_blocks_to_tokens(blocks, x, places, **same)

    @jax.jit
    def run(blocks, x):
        results = []
        for method in (few, whole):
            outputs, back = jax.vjp(method, blocks, x)
            ups = up.astype(outputs[0].dtype), 0.1 * x.astype(outputs[1].dtype)
            results.append((outputs, back(ups)))
        return results

    return run(blocks, x.astype(execution.dtype))


@pytest.mark.parametrize(
    ("case", "execution", "depth"),
    [(case, name, 3) for case in CASES for name in ("scanned", "unrolled")]
    + [("class token", "dots, all but the last frozen", 3)]
    + [("packed", "scanned", 1), ("end of text", "unrolled", 1)],  # the last is frozen: no gradient
)
def test_a_few_tokens_and_all_of_them_with_gradients_are_those_of_whole_blocks(
    case, execution, depth
):
    found, expected = both(case, EXECUTIONS[execution], depth)
    for ours, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)
    frozen = EXECUTIONS[execution].frozen_layers
    assert frozen < depth or not any(leaf.any() for leaf in jax.tree.leaves(found[1]))


def test_in_bfloat16_they_differ_by_its_roundings():
    found, expected = both("end of text", Execution(dtype=jnp.bfloat16), 3)
    for ours, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == reference.dtype
        ours, reference = (np.asarray(x, np.float32) for x in (ours, reference))
        np.testing.assert_allclose(ours, reference, atol=0.03 * np.abs(reference).max() + 1e-6)


def test_nothing_else_is_computed_of_the_last_block():
    """Of a tower of one block, by its products."""
    config = dataclasses.replace(IMAGE, depth=1, activation="gelu", qk_norm=False)
    blocks = stacked_blocks(config, Execution(), is_causal=False, rngs=nnx.Rngs(0))

    def flops(result):
        def run(blocks, x):
            return run_blocks_to_tokens(blocks, x, 0, depth=1, execution=Execution())[result]

        compiled = jax.jit(run).lower(blocks, tokens(B, 50, 32)).compile()
        return compiled.cost_analysis()["flops"]

    keys_and_values, others = 2 * 50 * 2 * 32**2, 2 * (2 * 32**2 + 8 * 32**2) + 4 * 50 * 32
    assert flops(0) == pytest.approx(B * (keys_and_values + others), rel=0.15)
    assert flops(1) > 4 * flops(0)
