"""Muon on stacked blocks beside optax's on one matrix at a time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from small import mesh_of, small_config

from clip_jax.parallel import partition_spec
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer_muon import (
    from_matrices,
    is_muon_matrix,
    orthogonal_update,
    orthogonalize,
    scale_by_muon,
    to_matrices,
)
from clip_jax.training.rates import map_with_path

QKV, OUT = "image/blocks/attention/qkv/kernel", "image/blocks/attention/out/kernel"
UP, DOWN = "text/blocks/mlp/up/kernel", "text/blocks/mlp/down/kernel"
# layers, then D 3 N H, N H D, D F, F D
SHAPES = {QKV: (2, 16, 3, 2, 8), OUT: (2, 2, 8, 16), UP: (2, 16, 24), DOWN: (2, 24, 16)}


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def matrices_of(path, array):
    """By hand: every matrix of every layer, as inputs x outputs."""
    for layer in np.asarray(array):
        if path == QKV:
            yield from (layer[:, i].reshape(16, 16) for i in range(3))
        else:
            yield layer.reshape(16, 16) if path == OUT else layer


def tree_of(path, array):
    for part in reversed(path.split("/")):
        array = {part: array}
    return array


def optax_muon(matrix):
    """optax's update of one matrix without momentum, with the same scale."""
    peer = optax.contrib.muon(1.0, beta=0.0, nesterov=False, consistent_rms=0.2)
    params = {"matrix": jnp.asarray(matrix)}
    updates, _ = peer.update(params, peer.init(params), params)
    return -np.asarray(updates["matrix"])


@pytest.mark.parametrize("path", SHAPES, ids=["qkv", "out", "up", "down"])
def test_each_matrix_moves_as_by_optax(path):
    """Nesterov momentum as Jordan et al. 2024 write it, then optax on each matrix alone."""
    rule = scale_by_muon(0.9, otherwise=optax.identity(), dtype=jnp.float32, mu_dtype=jnp.float32)
    gradients = [random(SHAPES[path], seed) for seed in range(3)]
    state, buffer = rule.init(tree_of(path, gradients[0])), 0.0
    for gradient in gradients:
        updates, state = rule.update(tree_of(path, gradient), state)
        buffer = 0.9 * buffer + 0.1 * gradient
    (update,) = jax.tree.leaves(updates)
    wanted = list(matrices_of(path, 0.9 * buffer + 0.1 * gradients[-1]))
    assert len(wanted) == (6 if path == QKV else 2)
    for got, matrix in zip(matrices_of(path, update), wanted, strict=True):
        np.testing.assert_allclose(got, optax_muon(matrix), atol=1e-4)


def test_matrices_go_back_where_they_came_from():
    for path, shape in SHAPES.items():
        array = jnp.asarray(random(shape))
        matrices = to_matrices(path, array)
        for got, wanted in zip(matrices, matrices_of(path, array), strict=True):
            np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(from_matrices(path, matrices, shape), array)


def test_singular_vectors_stay_and_scale_does_not_matter():
    gradient = random((1, 12, 20))
    u, _, vt = np.linalg.svd(gradient[0], full_matrices=False)
    for factor in (1e-10, 1.0, 1e10):
        got = np.asarray(orthogonalize(jnp.asarray(factor * gradient)))[0]
        inner = u.T @ got @ vt.T
        np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-4)
        assert (np.diag(inner) > 0.6).all()
    assert not np.asarray(orthogonalize(jnp.zeros((2, 4, 4)))).any()


def test_root_mean_square_is_that_of_adamw():
    for path, shape in SHAPES.items():
        update = orthogonal_update(path, jnp.asarray(random(shape)), dtype=jnp.float32)
        assert np.sqrt(np.square(update).mean()) == pytest.approx(0.2, rel=0.2)


def test_bfloat16_iterations_are_near_those_in_float32():
    gradient = jnp.asarray(random(SHAPES[QKV]))
    exact, rounded = (
        np.asarray(orthogonal_update(QKV, gradient, dtype=dtype))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded.dtype == np.float32
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.1


def test_only_matrices_of_blocks_are_orthogonalized():
    params, _ = jax.eval_shape(ContrastiveTask(small_config(), mesh_of()).init, jax.random.key(0))
    chosen = []
    map_with_path(lambda path, _: chosen.append(path) if is_muon_matrix(path) else None, params)
    assert sorted(chosen) == [
        f"{tower}/blocks/{name}/kernel"
        for tower in ("image", "text")
        for name in ("attention/out", "attention/qkv", "mlp/down", "mlp/up")
    ]
    for path in (
        "image/pooling/query/kernel",
        "image/pooling/mlp/up/kernel",
        "text/token_embedding",
        "image_projection/kernel",
        "text_projection/up/kernel",
        "image/blocks/mlp/up/bias",
        "image/stage_0/block_0/convolution_0/kernel",
    ):
        assert not is_muon_matrix(path)


@pytest.mark.parametrize("path", [QKV, DOWN], ids=["qkv", "down"])
def test_devices_share_the_matrices_and_nothing_else(path):
    """Of 6 (2) matrices on 8 devices each does at most one, without a word to the others."""
    mesh, gradient = mesh_of(2, 2, 2), jnp.asarray(random(SHAPES[path]))
    own = NamedSharding(mesh, partition_spec(path, gradient.shape, mesh))
    update = jax.jit(
        lambda g: orthogonal_update(path, g, dtype=jnp.float32, mesh=mesh),
        in_shardings=own,
        out_shardings=own,
    )
    compiled = update.lower(gradient).compile()
    got = compiled(jax.device_put(gradient, own))
    wanted = orthogonal_update(path, gradient, dtype=jnp.float32)
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    text = compiled.as_text()
    # There and back over fsdp and tensor, then from one `data` row to the other: no more matrices
    # than the two of its row are ever on a device.
    assert text.count(" all-to-all(") == 4
    assert re.findall(r"f32\[(\d+),\d+,\d+\]\S* all-gather\(", text) == ["2"]
    assert not re.search(r" (all-reduce|collective-permute|reduce-scatter)\(", text)
    products = re.findall(r"f32\[([\d,]+)\]\S* dot\(", text)
    assert products
    assert all(shape.count(",") < 2 or shape.startswith("1,") for shape in products)
