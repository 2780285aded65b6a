"""Adafactor on stacked layers beside big_vision's formula on each layer alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clip_jax.training.optimizer_adafactor import factored_axes, scale_by_adafactor

D, N, H, F = 40, 2, 32, 48
LAYERS = 33  # more than 32: an axis that a rule blind to layers would factor over
SHAPES = {
    "image/blocks/attention/qkv/kernel": (LAYERS, D, 3, N, H),
    "image/blocks/attention/qkv/bias": (LAYERS, 3, N, H),
    "image/blocks/attention/out/kernel": (LAYERS, N, H, D),
    "image/blocks/mlp/up/kernel": (LAYERS, D, F),
    "image/blocks/mlp/up/bias": (LAYERS, F),
    "image/position_embedding": (4, D),
    "text/token_embedding": (F, D),
    "log_logit_scale": (),
}


def nested(leaves):
    tree = {}
    for path, leaf in leaves.items():
        *groups, name = path.split("/")
        group = tree
        for part in groups:
            group = group.setdefault(part, {})
        group[name] = leaf
    return tree


def random_gradients(seed):
    rng = np.random.default_rng(seed)
    # Rows and columns of different sizes: a wrong mean would show.
    return {
        path: (
            rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 0, size=shape[:1] or ())
            if len(shape) < 2
            else rng.normal(size=shape)
            * 10.0 ** rng.uniform(-3, 0, size=(*shape[:1], *(1,) * (len(shape) - 1)))
            * np.linspace(0.1, 1, shape[-1])
        ).astype(np.float32)
        for path, shape in SHAPES.items()
    }


def numpy_adafactor(gradients, cap):
    """Updates of one array by big_vision's formula, in float64: a list of those of each step."""
    shape = gradients[0].shape
    axes = np.argsort(shape, kind="stable")
    factored = len(shape) >= 2 and shape[axes[-2]] >= 32
    moments, updates = [0.0, 0.0], []
    for t, gradient in enumerate(np.asarray(gradients, np.float64), 1):
        decay = min(cap, 1 - t**-0.8)
        squares = gradient**2 + 1e-30
        if not factored:
            moments[0] = decay * moments[0] + (1 - decay) * squares
            updates.append(gradient / np.sqrt(moments[0]))
            continue
        d1, d0 = axes[-2], axes[-1]
        for i, axis in enumerate((d0, d1)):
            moments[i] = decay * moments[i] + (1 - decay) * squares.mean(axis, keepdims=True)
        row, column = moments
        updates.append(gradient / np.sqrt(row / row.mean(d1, keepdims=True)) / np.sqrt(column))
    return updates


def one_by_one(path, array):
    """The arrays that big_vision would have for ours: by layer, by q, k and v."""
    layers = array if "/blocks/" in path else array[None]
    for layer in layers:
        yield from np.moveaxis(layer, -3, 0) if "qkv" in path else [layer]


@pytest.fixture(scope="module")
def steps():
    """Four gradients, and the updates and last state that the rule makes of them."""
    rule = scale_by_adafactor(highest_decay=0.5)
    gradients = [random_gradients(seed) for seed in range(4)]
    state, update, updates = rule.init(nested(gradients[0])), jax.jit(rule.update), []
    for gradient in gradients:
        new, state = update(nested(gradient), state)
        updates.append(new)
    return gradients, updates, state


@pytest.mark.parametrize("path", SHAPES)
def test_each_layer_is_big_visions(steps, path):
    gradients, updates, _ = steps

    def leaf(tree):
        for part in path.split("/"):
            tree = tree[part]
        return np.asarray(tree)

    here = zip(*(list(one_by_one(path, leaf(update))) for update in updates), strict=True)
    theirs = zip(*(list(one_by_one(path, gradient[path])) for gradient in gradients), strict=True)
    for ours, inputs in zip(here, theirs, strict=True):
        for got, wanted in zip(ours, numpy_adafactor(inputs, cap=0.5), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-5)


def test_one_matrix_is_optaxs():
    rule, peer = (
        scale_by_adafactor(highest_decay=1.0),
        optax.scale_by_factored_rms(min_dim_size_to_factor=32),
    )
    params = {"text_projection": {"kernel": jnp.zeros((40, 64))}}
    state, peer_state, peer_update = rule.init(params), peer.init(params), jax.jit(peer.update)
    for seed in range(3):
        kernel = np.random.default_rng(seed).normal(size=(40, 64)).astype(np.float32)
        gradients = {"text_projection": {"kernel": jnp.asarray(kernel)}}
        updates, state = rule.update(gradients, state)
        wanted, peer_state = peer_update(gradients, peer_state, params)
        kernels = (tree["text_projection"]["kernel"] for tree in (updates, wanted))
        np.testing.assert_allclose(*kernels, rtol=1e-5)


def test_state_is_float32_and_a_fraction_of_the_parameters(steps):
    _, _, state = steps
    blocks = state.nu["image"]["blocks"]
    assert blocks["mlp"]["up"]["kernel"]["row"].shape == (LAYERS, D)
    assert blocks["mlp"]["up"]["kernel"]["column"].shape == (LAYERS, F)
    assert blocks["attention"]["qkv"]["kernel"]["column"].shape == (LAYERS, D, 3, N)
    assert blocks["mlp"]["up"]["bias"].shape == (LAYERS, F)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.nu)} == {jnp.dtype("float32")}
    assert int(state.count) == 4


def test_neither_layers_nor_q_k_and_v_are_factored_over():
    assert factored_axes("text/blocks/mlp/up/bias", (48, 64)) is None
    assert factored_axes("text/blocks/attention/qkv/kernel", (48, 64, 3, 2, 16)) is None
    assert factored_axes("image/pooling/key_value/kernel", (64, 2, 4, 32)) == (3, 0)
    assert factored_axes("text/token_embedding", (48, 64)) == (0, 1)
