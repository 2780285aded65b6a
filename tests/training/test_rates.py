"""Learning rates by layer beside timm's groups, frozen layers beside open_clip's `lock`."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from interop import open_clip_models as peer
from peers import open_clip_or_skip
from small import mesh_of, small_config, small_model

from clip_jax.checkpoint import unflatten
from clip_jax.config import OptimizerConfig, StartConfig, TowerRateConfig
from clip_jax.interop.open_clip import read
from clip_jax.interop.open_clip_tables import rows
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.rates import learning_rate_factors, map_with_path, of_what_trains

DEPTH = 3


def factors_of(config, params=None, trainable=None):
    """By path."""
    if params is None:
        task = ContrastiveTask(config, mesh_of())
        params, _ = jax.eval_shape(task.init, jax.random.key(0))
    named = {}
    factors = learning_rate_factors(config, params, trainable)
    map_with_path(
        lambda path, factor, param: named.update({path: (factor, param.shape)}), factors, params
    )
    for path, (factor, shape) in named.items():
        assert factor.dtype == np.float32
        assert np.broadcast_shapes(factor.shape, shape) == shape, path
    return {path: factor for path, (factor, _) in named.items()}


def three_blocks(**optimizer):
    model = small_model()
    model = dataclasses.replace(
        model,
        image=dataclasses.replace(model.image, depth=DEPTH),
        text=dataclasses.replace(model.text, depth=DEPTH),
    )
    return small_config(model=model, optimizer=OptimizerConfig(**optimizer))


def test_layer_decay_is_timms():
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    there = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=DEPTH, num_heads=2, pre_norm=True
    )
    groups = param_groups_layer_decay(there, layer_decay=0.6)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scale = {name: scale[id(p)] for name, p in there.named_parameters()}
    here = factors_of(three_blocks(image=TowerRateConfig(layer_decay=0.6)))
    for name, path in {
        "patch_embed.proj.weight": "image/stem/project/kernel",
        "cls_token": "image/class_embedding",
        "pos_embed": "image/position_embedding",
        "norm_pre.weight": "image/pre_norm/scale",
        "norm.weight": "image/final_norm/scale",
        "norm.bias": "image/final_norm/bias",
        "head.weight": "image_projection/kernel",
    }.items():
        assert here[path] == pytest.approx(scale[name]), name
    for name, path in {
        "attn.qkv.weight": "attention/qkv/kernel",
        "attn.proj.bias": "attention/out/bias",
        "mlp.fc1.weight": "mlp/up/kernel",
        "norm2.weight": "mlp_norm/scale",
    }.items():
        layers = [scale[f"blocks.{i}.{name}"] for i in range(DEPTH)]
        np.testing.assert_allclose(here[f"image/blocks/{path}"].ravel(), layers, rtol=1e-6)
    assert scale["patch_embed.proj.weight"] == pytest.approx(0.6**4)  # and not all 1
    assert all((factor == 1).all() for path, factor in here.items() if path.startswith("text"))


@pytest.fixture(scope="module")
def open_clip_model(tmp_path_factory):
    open_clip = open_clip_or_skip()
    vision = {"image_size": 16, "layers": DEPTH, "width": 32, "head_width": 16, "patch_size": 8}
    text = {
        "context_length": 8,
        "vocab_size": 64,
        "width": 32,
        "heads": 2,
        "layers": DEPTH,
        "hf_tokenizer_name": peer.NO_TOKENIZER,
    }
    cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    model = peer.build(open_clip, cfg)
    return model, read(peer.save(model, cfg, tmp_path_factory.mktemp("locked")))


@pytest.mark.parametrize("frozen", [1, DEPTH - 1, DEPTH])
def test_frozen_layers_are_open_clips_lock(open_clip_model, frozen):
    """Its groups: embeddings, blocks (the last with the final norm), projection."""
    model, weights = open_clip_model
    model.visual.lock(unlocked_groups=DEPTH + 1 - frozen)
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    config = small_config(
        model=weights.model, optimizer=OptimizerConfig(image=TowerRateConfig(frozen_layers=frozen))
    )
    factors = factors_of(config, unflatten(weights.arrays))
    image = [
        row
        for row in rows(weights.model, custom_text=False, vector_scalars=False)
        if row.ours.startswith("image")
    ]
    assert {row.ours for row in image} == {path for path in factors if path.startswith("image")}
    for row in image:
        factor = factors[row.ours].ravel()
        for layer in range(DEPTH if row.stacked else 1):
            (name,) = row.names(layer)
            assert (factor[layer if factor.size > 1 else 0] > 0) == trains[name], name


def test_multipliers_and_what_does_not_train():
    config = three_blocks(
        text=TowerRateConfig(multiplier=0.5, layer_decay=0.5, frozen_layers=2),
        image=TowerRateConfig(multiplier=3.0),
        frozen=("image/blocks/mlp/.*", "text_projection/kernel"),
    )
    factors = factors_of(config, trainable=lambda path: path != "image/final_norm/bias")
    for path, factor in factors.items():
        if re.match("image/blocks/mlp/|text_projection|image/final_norm/bias", path):
            wanted = 0.0
        elif path.startswith("image"):
            wanted = 3.0
        elif path.startswith("text/blocks"):
            wanted = [0.0, 0.0, 0.25]
        else:
            wanted = {"text/final_norm/scale": 0.25, "text/final_norm/bias": 0.25}.get(path, 0.0)
            wanted = 1.0 if path == "log_logit_scale" else wanted
        np.testing.assert_array_equal(factor.ravel(), wanted, err_msg=path)


def test_locked_towers_are_frozen():
    config = dataclasses.replace(three_blocks(), start=StartConfig(model="x", lock=("text",)))
    factors = factors_of(config)
    assert {path for path, factor in factors.items() if not factor.any()} == {
        path for path in factors if path.startswith("text/")
    }


def test_gradients_of_what_is_frozen_are_zero_even_where_they_are_not_numbers():
    gradients = {"a": np.full((2, 3), np.nan), "b": np.array([[np.inf, np.nan], [3.0, 4.0]])}
    factors = {"a": np.zeros(()), "b": np.array([[0.0], [0.5]])}
    masked = of_what_trains(gradients, factors)
    np.testing.assert_array_equal(masked["a"], np.zeros((2, 3)))
    np.testing.assert_array_equal(masked["b"], [[0.0, 0.0], [3.0, 4.0]])
