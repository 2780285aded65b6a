"""The NaFlex tower against transformers' Siglip2VisionModel with the same random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models.vision_peers import SIGLIP, from_peer, perturbed, transformers_or_skip, with_params

from clip_jax.config import ImageTowerConfig
from clip_jax.models import Execution, NaFlexTransformer, VisionTransformer, unit_length

CONFIG = ImageTowerConfig(
    kind="naflex",
    image_size=32,
    patch_size=4,
    patch_bias=True,
    max_num_patches=48,
    width=32,
    depth=2,
    num_heads=4,
    mlp_ratio=2.0,
    activation="gelu_tanh",
    layer_norm_epsilon=1e-6,
    class_token=False,
    pre_norm=False,
    pooling="attention",
)
# Rows and columns of patches, of a grid of 8 x 8: grown, shrunk, both, one patch, all of 48.
SHAPES = np.array([(6, 8), (12, 3), (2, 20), (1, 1), (5, 9), (1, 48), (8, 6), (3, 3)], np.int32)


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    patches = rng.standard_normal((len(SHAPES), 48, 48)).astype(np.float32)
    mask = np.arange(48) < SHAPES.prod(axis=1)[:, None]
    return jnp.asarray(patches), jnp.asarray(mask), jnp.asarray(SHAPES)


def tower(seed=0, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return NaFlexTransformer(config, Execution(), rngs=nnx.Rngs(seed))


def test_features_and_gradients_equal_transformers():
    transformers = transformers_or_skip()
    import torch

    torch.manual_seed(0)
    peer = transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_patches=64,
            patch_size=4,
        )
    )
    peer = perturbed(peer)
    patches, mask, shapes = inputs()
    output = peer(
        pixel_values=torch.tensor(np.asarray(patches)),
        pixel_attention_mask=torch.tensor(np.asarray(mask)).int(),
        spatial_shapes=torch.tensor(SHAPES).long(),
    )
    target = np.random.default_rng(1).standard_normal((len(SHAPES), 32)).astype(np.float32)
    (torch.tensor(target) * output.pooler_output).sum().backward()

    weights = {name: p.detach().numpy() for name, p in peer.named_parameters()}
    params = from_peer(weights, SIGLIP, heads=4)

    @jax.jit
    def run(params):
        def loss(params):
            model = with_params(tower, params)
            pooled, tokens = model(patches, mask, shapes)
            return (pooled * target).sum(), (pooled, tokens)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (pooled, tokens)), gradients = run(params)
    np.testing.assert_allclose(
        unit_length(pooled),
        torch.nn.functional.normalize(output.pooler_output, dim=1).detach().numpy(),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        np.asarray(tokens)[np.asarray(mask)],
        output.last_hidden_state.detach().numpy()[np.asarray(mask)],
        atol=1e-4,  # values up to 5
    )
    peer_gradients = {name: p.grad.numpy() for name, p in peer.named_parameters()}
    expected = from_peer(peer_gradients, SIGLIP, heads=4)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, atol=1e-5 * max(1, np.abs(theirs).max())
        ),
        gradients,
        expected,
    )


OPTIONS = [
    {},
    {"pooling": "mean", "num_registers": 2},
    {"pooling": "mean", "norm_after_pooling": True, "pre_norm": True},
    {"position_embedding": "sincos2d", "num_registers": 1},
]


@pytest.mark.parametrize("changes", OPTIONS)
def test_images_of_the_table_s_own_grid_are_those_of_a_vision_transformer(changes):
    model = tower(image_size=16, **changes)
    config = dataclasses.replace(model.config, kind="vit")
    same = with_params(
        lambda: VisionTransformer(config, Execution(), rngs=nnx.Rngs(0)),
        nnx.to_pure_dict(nnx.state(model)),
    )
    image = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    patches = image.reshape(2, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, 48)
    patches = jnp.pad(patches, ((0, 0), (0, 8), (0, 0)))
    mask = jnp.broadcast_to(jnp.arange(24) < 16, (2, 24))
    run = jax.jit(lambda m, *x: m(*x))
    pooled, tokens = run(model, patches, mask, jnp.full((2, 2), 4, jnp.int32))
    expected, expected_tokens = run(same, image)
    np.testing.assert_allclose(pooled, expected, atol=1e-5)
    np.testing.assert_allclose(tokens[:, : expected_tokens.shape[1]], expected_tokens, atol=1e-5)


@pytest.mark.parametrize("changes", OPTIONS)
def test_padding_changes_nothing(changes):
    model = tower(**changes)
    patches, mask, shapes = inputs()
    run = jax.jit(lambda m, *x: m(*x)[0])
    expected = run(model, patches, mask, shapes)
    other = jnp.where(mask[:, :, None], patches, 7.0)
    np.testing.assert_allclose(run(model, other, mask, shapes), expected, atol=1e-5)
    longer = (jnp.pad(x, ((0, 0), (0, 16), (0, 0))[: x.ndim]) for x in (patches, mask))
    np.testing.assert_allclose(run(model, *longer, shapes), expected, atol=1e-5)
    assert not np.allclose(run(model, patches, mask, shapes[:, ::-1]), expected, atol=1e-3)


def test_gradients_reach_every_parameter_and_are_finite_beside_empty_rows():
    model = tower(num_registers=2, pre_norm=True)
    patches, mask, shapes = inputs()
    mask, shapes = mask.at[0].set(False), shapes.at[0].set(0)  # a row that only fills the batch
    gradients = jax.jit(jax.grad(lambda m: (m(patches, mask, shapes)[0] ** 3).sum()))(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_uint8_is_normalised_on_the_device():
    model = tower()
    _, mask, shapes = inputs()
    pixels = np.random.default_rng(0).integers(0, 256, (len(SHAPES), 48, 48), np.uint8)
    normalised = pixels.reshape(len(SHAPES), 48, 16, 3) / 255 - np.array(CONFIG.mean)
    normalised = (normalised / np.array(CONFIG.std)).astype(np.float32).reshape(pixels.shape)
    run = jax.jit(lambda m, x: m(x, mask, shapes)[0])
    np.testing.assert_allclose(run(model, pixels), run(model, normalised), atol=1e-4)


def test_patch_dropout_keeps_a_share_of_the_real_patches():
    """A row computed with its kept patches alone: nothing of the rest, or of padding, is in it."""
    model = tower(patch_dropout=0.5)
    patches, mask, shapes = inputs()
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    run = jax.jit(lambda m, x, keys: m(x, mask, shapes, row_keys_B=keys)[0])
    dropped = run(model, patches, keys)
    padding_changed = run(model, jnp.where(mask[:, :, None], patches, 7.0), keys)
    np.testing.assert_allclose(padding_changed, dropped, atol=1e-5)
    kept = jax.jit(jax.grad(lambda x: (run(model, x, keys) ** 3).sum()))(patches)
    num_kept = (np.abs(kept).max(axis=2) > 0).sum(axis=1)
    np.testing.assert_array_equal(num_kept, np.maximum(SHAPES.prod(axis=1) // 2, 1))
    whole = jax.jit(lambda m, x: m(x, mask, shapes)[0])
    np.testing.assert_array_equal(whole(model, patches), whole(tower(), patches))
