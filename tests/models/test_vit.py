"""The Vision Transformer, option by option, and against the peers with the same random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models.vision_peers import (
    SIGLIP,
    VIT,
    from_peer,
    perturbed,
    transformers_or_skip,
    with_params,
)
from peers import open_clip_or_skip
from small import small_model

from clip_jax.config import ImageTowerConfig
from clip_jax.models import Execution, VisionTransformer, unit_length
from clip_jax.models.vit import drop_patches

IMAGE = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
KEYS = jax.random.split(jax.random.key(0), 3)


def tower(**changes) -> tuple[ImageTowerConfig, VisionTransformer]:
    config = dataclasses.replace(small_model().image, **changes)
    return config, VisionTransformer(config, Execution(), rngs=nnx.Rngs(0))


OPTIONS = [
    {},
    {"pooling": "mean", "class_token": False, "activation": "swiglu"},
    {"pooling": "attention", "pre_norm": False, "class_token": False, "patch_bias": True},
    {"pooling": "attention", "num_registers": 2, "qk_norm": True},
    {"pooling": "mean", "norm_after_pooling": True, "num_registers": 1, "layer_scale_init": 0.1},
    {"position_embedding": "sincos2d", "num_registers": 1},
    {"stem": "conv", "stem_widths": (8, 16), "stem_strides": (2, 2)},
    {"stem": "conv", "stem_widths": (8, 8, 16, 32), "stem_strides": (2, 1, 2, 2)},
]


@pytest.mark.parametrize("changes", OPTIONS)
def test_shapes_and_every_parameter_has_a_gradient(changes):
    config, model = tower(**changes)

    @jax.jit
    def run(model):
        (_, outputs), gradients = jax.value_and_grad(
            lambda m: ((m(IMAGE)[0] ** 3).sum(), m(IMAGE)), has_aux=True
        )(model)
        return outputs, gradients

    (pooled, tokens), gradients = run(model)
    assert pooled.shape == (3, 32)
    assert pooled.dtype == jnp.float32
    assert tokens.shape == (3, 4 + config.class_token + config.num_registers, 32)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_without_pooling_the_tokens_stand_for_the_features():
    _, model = tower(pooling="none", class_token=False)
    pooled, tokens = model(IMAGE)
    assert pooled.shape == (3, 4, 32)
    np.testing.assert_array_equal(pooled, tokens)


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("after", [False, True])
def test_mean_pooling_is_over_the_patches(registers, after):
    """The class token and the registers stay out; the norm comes before or after the mean."""
    _, model = tower(pooling="mean", num_registers=registers, norm_after_pooling=after)
    model.final_norm.bias[...] = jnp.arange(32.0)
    pooled, tokens = model(IMAGE)
    patches = np.asarray(tokens)[:, 1 + registers :]
    expected = patches.mean(axis=1)
    if after:  # then the tokens are those before the norm
        centred = expected - expected.mean(axis=1, keepdims=True)
        expected = centred / np.sqrt(expected.var(axis=1, keepdims=True) + 1e-5) + np.arange(32)
    np.testing.assert_allclose(pooled, expected, atol=1e-4)


def test_pooled_features_after_the_norm_are_float32_in_bfloat16_towers():
    config = dataclasses.replace(small_model().image, pooling="mean", norm_after_pooling=True)
    model = VisionTransformer(config, Execution(dtype=jnp.bfloat16), rngs=nnx.Rngs(0))
    pooled, tokens = model(IMAGE)
    assert tokens.dtype == jnp.bfloat16
    assert np.any(pooled != pooled.astype(jnp.bfloat16))


def test_registers_are_a_set_without_positions():
    _, model = tower(num_registers=2)
    assert model.position_embedding.shape == (5, 32)
    before = model(IMAGE)[0]
    registers = model.register_embedding[...]
    model.register_embedding[...] = registers[::-1]
    np.testing.assert_allclose(model(IMAGE)[0], before, atol=1e-5)
    model.register_embedding[...] = registers.at[0].set(registers[0, ::-1])
    assert not np.allclose(model(IMAGE)[0], before, atol=1e-3)


def test_sincos_positions_are_no_parameter():
    _, model = tower(position_embedding="sincos2d", pre_norm=False, depth=1)
    assert not hasattr(model, "position_embedding")
    flat = np.zeros((1, 16, 16, 3), np.float32)  # all patches alike, but for their positions
    pooled, tokens = model(flat)
    assert np.isfinite(pooled).all()
    assert len(np.unique(np.asarray(tokens[0]).round(3), axis=0)) == 5


def test_patch_dropout_drops_in_training_alone():
    _, model = tower(patch_dropout=0.5, num_registers=1)
    _, whole = tower(num_registers=1)
    np.testing.assert_array_equal(model(IMAGE)[0], whole(IMAGE)[0])
    pooled, tokens = model(IMAGE, row_keys_B=KEYS)
    assert tokens.shape == (3, 2 + 2, 32)
    assert not np.allclose(pooled, whole(IMAGE)[0], atol=1e-3)
    other = model(IMAGE, row_keys_B=jax.random.split(jax.random.key(1), 3))[0]
    assert not np.allclose(pooled, other, atol=1e-3)


def test_a_row_keeps_its_patches_wherever_it_is_computed():
    _, model = tower(patch_dropout=0.5)
    pooled = model(IMAGE, row_keys_B=KEYS)[0]
    turned = model(IMAGE[::-1], row_keys_B=KEYS[::-1])[0][::-1]
    np.testing.assert_allclose(turned, pooled, atol=1e-6)
    np.testing.assert_allclose(model(IMAGE[1:2], row_keys_B=KEYS[1:2])[0], pooled[1:2], atol=1e-6)


@pytest.mark.parametrize(("rate", "kept"), [(0.5, 8), (0.75, 4), (0.2, 12), (0.99, 1)])
def test_dropped_patches_are_a_random_subset(rate, kept):
    x = jnp.broadcast_to(jnp.arange(16.0)[:, None], (500, 16, 2))
    keys = jax.random.split(jax.random.key(0), 500)
    lengths = jnp.full(500, 16, jnp.int32)
    found, new_lengths = drop_patches(x, lengths, rate=rate, row_keys_B=keys)
    assert found.shape == (500, kept, 2)  # open_clip: int(16 * (1 - rate)), at least one
    assert (new_lengths == kept).all()
    rows = np.asarray(found[:, :, 0]).astype(int)
    assert all(len(set(row)) == kept for row in rows)
    share = np.bincount(rows.ravel(), minlength=16) / 500
    deviation = np.sqrt(kept / 16 * (1 - kept / 16) / 500)
    assert np.abs(share - kept / 16).max() < 4 * deviation  # 16 draws: once in a thousand


def peer_parity(config, peer, names, pooled_of):
    """Normalised features of one batch, ours and the peer's."""
    import torch

    image = np.random.default_rng(0).standard_normal((4, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        output = peer(torch.tensor(image.transpose(0, 3, 1, 2)))
    weights = {name: p.detach().numpy() for name, p in peer.named_parameters()}
    params = from_peer(weights, names, config.num_heads)
    model = with_params(lambda: VisionTransformer(config, Execution(), rngs=nnx.Rngs(0)), params)
    pooled, tokens = model(image)
    expected = torch.nn.functional.normalize(pooled_of(output), dim=1).numpy()
    np.testing.assert_allclose(unit_length(pooled), expected, atol=1e-5)
    np.testing.assert_allclose(tokens, output.last_hidden_state.numpy(), atol=1e-4)


def test_features_equal_transformers_vit():
    transformers = transformers_or_skip()
    import torch

    torch.manual_seed(0)
    peer = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
        ),
        add_pooling_layer=False,
    )
    config = ImageTowerConfig(
        image_size=16,
        patch_size=4,
        patch_bias=True,
        width=32,
        depth=2,
        num_heads=4,
        mlp_ratio=2.0,
        layer_norm_epsilon=1e-12,
        pre_norm=False,
    )
    peer_parity(config, perturbed(peer), VIT, lambda output: output.last_hidden_state[:, 0])


def test_features_equal_transformers_siglip():
    transformers = transformers_or_skip()
    import torch

    torch.manual_seed(0)
    peer = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
        )
    )
    config = ImageTowerConfig(
        image_size=16,
        patch_size=4,
        patch_bias=True,
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
    peer_parity(config, perturbed(peer), SIGLIP, lambda output: output.pooler_output)


@pytest.mark.parametrize("options", [{"reg_tokens": 2, "class_token": False}, {"reg_tokens": 1}])
def test_registers_and_pooling_equal_timm(options):
    """Registers, QK-norm, LayerScale and attention pooling, all of which timm has too."""
    open_clip_or_skip()
    import timm
    import torch

    torch.manual_seed(0)
    peer = timm.models.vision_transformer.VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=4,
        mlp_ratio=2,
        num_classes=0,
        no_embed_class=True,
        global_pool="map",
        qk_norm=True,
        init_values=0.5,
        **options,
    )
    peer = perturbed(peer)
    p = {name: jnp.asarray(x.detach().numpy()) for name, x in peer.named_parameters()}
    config = ImageTowerConfig(
        image_size=16,
        patch_size=4,
        patch_bias=True,
        width=32,
        depth=2,
        num_heads=4,
        mlp_ratio=2.0,
        layer_norm_epsilon=1e-6,
        pre_norm=False,
        pooling="attention",
        qk_norm=True,
        layer_scale_init=0.5,
        num_registers=options["reg_tokens"],
        class_token=options.get("class_token", True),
    )

    def linear(name, width_out=None):
        return {"kernel": p[name + ".weight"].T, "bias": p[name + ".bias"]}

    def norm(name):
        return {"scale": p[name + ".weight"], "bias": p[name + ".bias"]}

    def heads(name, *shape):
        part = linear(name)
        return {
            "kernel": part["kernel"].reshape(32, *shape, 4, 8),
            "bias": part["bias"].reshape(*shape, 4, 8),
        }

    def out(name):
        part = linear(name)
        return {"kernel": part["kernel"].reshape(4, 8, 32), "bias": part["bias"]}

    def block(i):
        name = f"blocks.{i}"
        return {
            "attention_norm": norm(f"{name}.norm1"),
            "attention": {
                "qkv": heads(f"{name}.attn.qkv", 3),
                "query_norm": norm(f"{name}.attn.q_norm"),
                "key_norm": norm(f"{name}.attn.k_norm"),
                "out": out(f"{name}.attn.proj"),
            },
            "attention_scale": p[f"{name}.ls1.gamma"],
            "mlp_norm": norm(f"{name}.norm2"),
            "mlp": {"up": linear(f"{name}.mlp.fc1"), "down": linear(f"{name}.mlp.fc2")},
            "mlp_scale": p[f"{name}.ls2.gamma"],
        }

    patch = p["patch_embed.proj.weight"]
    position = p["pos_embed"][0]
    params = {
        "stem": {
            "project": {
                "kernel": patch.transpose(2, 3, 1, 0).reshape(-1, 32),
                "bias": p["patch_embed.proj.bias"],
            }
        },
        "register_embedding": p["reg_token"][0],
        "position_embedding": position,
        "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), block(0), block(1)),
        "final_norm": norm("norm"),
        "pooling": {
            "probe": p["attn_pool.latent"][0],
            "query": heads("attn_pool.q"),
            "key_value": heads("attn_pool.kv", 2),
            "out": out("attn_pool.proj"),
            "norm": norm("attn_pool.norm"),
            "mlp": {"up": linear("attn_pool.mlp.fc1"), "down": linear("attn_pool.mlp.fc2")},
        },
    }
    if config.class_token:  # timm's has no position here
        params["class_embedding"] = p["cls_token"].reshape(32)
        params["position_embedding"] = jnp.concatenate([jnp.zeros((1, 32)), position])
    model = with_params(lambda: VisionTransformer(config, Execution(), rngs=nnx.Rngs(0)), params)
    image = np.random.default_rng(0).standard_normal((4, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        expected = peer(torch.tensor(image.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(unit_length(model(image)[0]), unit_length(expected), atol=1e-5)


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
