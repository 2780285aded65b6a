import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import small_model

from clip_jax.config import ImageTowerConfig
from clip_jax.models import Execution, VisionTransformer, forward_flops


def tower(**changes) -> tuple[ImageTowerConfig, VisionTransformer]:
    config = dataclasses.replace(small_model().image, **changes)
    return config, VisionTransformer(config, Execution(), rngs=nnx.Rngs(0))


OPTIONS = [
    {},
    {"pooling": "mean", "class_token": False},
    {"pooling": "attention", "pre_norm": False, "class_token": False},
    {"stem": "conv", "stem_widths": (8, 16), "stem_strides": (2, 2)},
    {"stem": "conv", "stem_widths": (8, 8, 16, 32), "stem_strides": (2, 1, 2, 2)},
]


@pytest.mark.parametrize("changes", OPTIONS)
def test_shapes_and_every_parameter_has_a_gradient(changes):
    config, model = tower(**changes)
    image = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    pooled, tokens = model(image)
    assert pooled.shape == (3, 32)
    assert pooled.dtype == jnp.float32
    assert tokens.shape == (3, 4 + config.class_token, 32)
    gradients = jax.grad(lambda m: (m(image)[0] ** 3).sum())(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("changes", OPTIONS)
def test_flops_are_what_xla_counts(changes):
    """Wide and unrolled, so that matrix products dominate and are all counted."""
    config = dataclasses.replace(small_model().image, width=128, image_size=32, **changes)
    model = dataclasses.replace(small_model(), image=config)
    abstract = jax.eval_shape(
        lambda key: VisionTransformer(config, Execution(unroll_layers=True), rngs=nnx.Rngs(key)),
        jax.random.key(0),
    )
    image = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    counted = jax.jit(lambda m, x: m(x)).lower(abstract, image).compile().cost_analysis()["flops"]
    analytic = 8 * (forward_flops(model)[0] - 2 * config.width * model.embed_dim)
    assert 0.95 < counted / analytic < 1.12


def test_patch_stem_is_a_strided_convolution():
    """Against torch's Conv2d with the same weights."""
    torch = pytest.importorskip("torch")
    _, model = tower()
    image = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    kernel = np.asarray(model.stem.project.kernel[...]).reshape(8, 8, 3, 32)
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(image.transpose(0, 3, 1, 2)),
        torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()),
        stride=8,
    )
    expected = expected.flatten(2).transpose(1, 2).numpy()
    np.testing.assert_allclose(model.stem(image), expected, atol=1e-5)


def test_conv_stem_folds_what_strides_leave():
    _, model = tower(stem="conv", stem_widths=(8, 16), stem_strides=(2, 2))
    assert model.stem.fold == 2
    assert model.stem.convolution_0.kernel[...].shape == (3, 3, 12, 8)


def test_uint8_is_normalised_on_the_device():
    config, model = tower()
    image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    normalised = (image / 255 - np.array(config.mean)) / np.array(config.std)
    np.testing.assert_allclose(
        model(image)[0], model(normalised.astype(np.float32))[0], rtol=1e-4, atol=1e-5
    )
