import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import open_clip_or_skip

from clip_jax.models import resample_position_embedding
from clip_jax.models.positions import resampled_per_sample, sincos2d


def test_sincos2d_is_the_formula():
    """One number at a time: quarters are sin and cos of the column, sin and cos of the row."""
    rows, columns, width = 3, 5, 16
    table = np.asarray(sincos2d((rows, columns), width))
    assert table.shape == (15, 16)
    for row in range(rows):
        for column in range(columns):
            for i in range(4):
                frequency = 10_000 ** (-i / 3)
                expected = [
                    f(position * frequency)
                    for position in (column, row)
                    for f in (math.sin, math.cos)
                ]
                found = table[row * columns + column, i::4]
                np.testing.assert_allclose(found, expected, atol=1e-6)


def test_sincos2d_of_the_smallest_width_is_finite():
    assert np.isfinite(sincos2d((2, 2), 4)).all()


@pytest.mark.parametrize("new", [(7, 7), (3, 3), (16, 16), (5, 9), (1, 1)])
@pytest.mark.parametrize("num_prefix", [0, 1])
def test_resampling_equals_torch(new, num_prefix):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).standard_normal((num_prefix + 42, 8)).astype(np.float32)
    grid = torch.tensor(table[num_prefix:].reshape(1, 6, 7, 8).transpose(0, 3, 1, 2))
    expected = torch.nn.functional.interpolate(
        grid, size=new, mode="bicubic", antialias=True, align_corners=False
    )
    expected = expected.flatten(2)[0].T.numpy()
    found = resample_position_embedding(table, (6, 7), new, num_prefix=num_prefix)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:num_prefix], table[:num_prefix])
    np.testing.assert_allclose(found[num_prefix:], expected, atol=5e-6)


@pytest.mark.parametrize("new", [4, 10])
def test_resampling_equals_open_clip(new):
    open_clip_or_skip()
    import torch
    from open_clip.model import resize_pos_embed

    class Model:
        class visual:  # noqa: N801 - open_clip's name
            grid_size = (new, new)

    table = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    state = {"visual.positional_embedding": torch.tensor(table)}
    resize_pos_embed(state, Model)
    found = resample_position_embedding(table, (7, 7), (new, new), num_prefix=1)
    np.testing.assert_allclose(found, state["visual.positional_embedding"].numpy(), atol=5e-6)


def test_resampling_to_the_same_grid_returns_the_same_bytes():
    table = np.random.default_rng(0).standard_normal((10, 8)).astype(np.float32)
    found = resample_position_embedding(jnp.asarray(table), (3, 3), (3, 3), num_prefix=1)
    np.testing.assert_array_equal(found, table)


def test_per_sample_equals_torch_for_each_shape():
    """Every shape of up to 24 patches, of a grid of 5 x 5, in one batch under jit."""
    torch = pytest.importorskip("torch")
    num_tokens = 24
    shapes = [(r, c) for r in range(1, 25) for c in range(1, 25) if r * c <= num_tokens]
    table = np.random.default_rng(0).standard_normal((5, 5, 8)).astype(np.float32)
    found = jax.jit(resampled_per_sample, static_argnums=2)(
        jnp.asarray(table), jnp.asarray(shapes, jnp.int32), num_tokens
    )
    assert np.isfinite(found).all()
    for (rows, columns), ours in zip(shapes, np.asarray(found), strict=True):
        # torch 2.13 on CPUs repeats the first row where one column is asked for: turned round,
        # the same numbers come out right.
        turned = columns == 1
        source = table.transpose(2, 1, 0) if turned else table.transpose(2, 0, 1)
        expected = torch.nn.functional.interpolate(
            torch.tensor(source[None]),
            size=(columns, rows) if turned else (rows, columns),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        expected = expected.flatten(2)[0].T.numpy()  # one row or column is a list either way
        np.testing.assert_allclose(ours[: rows * columns], expected, atol=2e-6)
