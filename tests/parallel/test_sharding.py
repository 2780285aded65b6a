import dataclasses
import logging

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from small import mesh_of, small_config, small_model

from clip_jax.config import PRESETS, ExperimentConfig, ModelConfig
from clip_jax.parallel import (
    matching_rules,
    partition_spec,
    to_global_batch,
)
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import abstract_state


def paths(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


TOWERS = {
    "conv stem": ({"stem": "conv", "stem_widths": (8, 16), "stem_strides": (2, 2)}, {}),
    "image options": (
        {
            "pooling": "attention",
            "patch_bias": True,
            "num_registers": 2,
            "qk_norm": True,
            "layer_scale_init": 0.1,
            "activation": "swiglu",
        },
        {"pooling": "attention", "causal": False, "activation": "swiglu"},
    ),
    "naflex and bert": (
        {"kind": "naflex", "class_token": False, "pooling": "attention", "pre_norm": False},
        {"kind": "bert", "pooling": "class_token", "pooler": True},
    ),
    "resnet and cbow": (
        {"kind": "resnet", "image_size": 32, "patch_size": 32, "resnet_layers": (1, 2, 1, 1)},
        {"kind": "cbow", "pooling": "mean"},
    ),
}


def model_of(name: str) -> ModelConfig:
    if name in PRESETS:
        return PRESETS[name]
    model, (image, text) = small_model(), TOWERS[name]
    projections = {"image_projection": "mlp", "text_projection": "linear_bias"}
    return dataclasses.replace(
        model,
        image=dataclasses.replace(model.image, **image),
        text=dataclasses.replace(model.text, **text),
        logit_bias_init=-10.0,
        **projections,
    )


def shrunk(model: ModelConfig) -> ModelConfig:
    """A small model with arrays at the same paths, which depend on the options alone."""
    size = {"width": 32, "depth": 1, "num_heads": 2}
    image = size | {"resnet_layers": (1,) * len(model.image.resnet_layers)}
    return dataclasses.replace(
        model,
        name="shrunk",
        embed_dim=32,
        image=dataclasses.replace(model.image, **image),
        text=dataclasses.replace(model.text, vocab_size=9, eot_id=None, **size),
    )


# Presets of a family have the same paths: one of each is looked at.
FAMILIES = {shrunk(model): name for name, model in PRESETS.items()}


@pytest.mark.parametrize("name", [*FAMILIES.values(), *TOWERS])
def test_every_array_of_every_model_matches_exactly_one_rule(name):
    config = ExperimentConfig(model=shrunk(model_of(name)))
    task, optimizer = ContrastiveTask(config, mesh_of()), make_optimizer(config)
    state = abstract_state(task, optimizer, mesh_of(), ema=True)
    for path, leaf in paths(state):
        assert len(matching_rules(path)) == 1, (path, leaf.shape)


@pytest.mark.parametrize("name", TOWERS)
def test_every_matrix_of_every_kind_of_tower_is_split(name):
    """Matrices alone: a table of few rows, as that of segments, is not worth it."""
    config = ExperimentConfig(model=model_of(name))
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    state = abstract_state(ContrastiveTask(config, mesh), make_optimizer(config), mesh)
    tensor = set()
    for path, leaf in paths(state.params):
        if path.endswith("/kernel"):
            assert "fsdp" in leaf.sharding.spec, path
            if "tensor" in leaf.sharding.spec:
                tensor.add(path.split("/", 2)[-1])
    blocks = {"attention/qkv/kernel", "attention/out/kernel", "mlp/up/kernel", "mlp/down/kernel"}
    if name != "resnet and cbow":
        assert tensor >= blocks
    if name == "image options":
        assert "mlp/gate/kernel" in tensor


def test_large_arrays_are_split_over_fsdp_and_tensor():
    config = ExperimentConfig(model=PRESETS["ViT-B-16"])
    mesh = mesh_of(fsdp=4, tensor=2)
    state = abstract_state(ContrastiveTask(config, mesh), make_optimizer(config), mesh)
    for path, leaf in paths(state):
        if leaf.size * 4 > 1 << 20:
            shard = leaf.sharding.shard_shape(leaf.shape)
            assert np.prod(shard) * 4 <= leaf.size, (path, leaf.shape, shard)


def test_the_first_dim_that_divides_is_taken(caplog):
    mesh = mesh_of(fsdp=8)
    up = "image/blocks/mlp/up/kernel"
    assert partition_spec(up, (2, 16, 30), mesh) == PartitionSpec(None, "fsdp", None)
    assert partition_spec(up, (2, 15, 32), mesh) == PartitionSpec(None, None, "fsdp")
    with caplog.at_level(logging.WARNING):
        assert partition_spec(up, (2, 1023, 1021), mesh) == PartitionSpec(None, None, None)
    assert "does not divide by fsdp = 8: kept whole" in caplog.text


def test_unknown_arrays_are_an_error():
    with pytest.raises(KeyError, match="0 sharding rules match image/new"):
        partition_spec("image/new", (3,), mesh_of())


def test_batch_rows_are_spread_over_data_and_fsdp():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    batch = to_global_batch({"tokens": np.arange(32, dtype=np.int32).reshape(8, 4)}, mesh)
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 4)}
    np.testing.assert_array_equal(batch["tokens"], np.arange(32).reshape(8, 4))


def test_small_config_has_no_replicated_matrix(caplog):
    config = small_config()
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    state = abstract_state(ContrastiveTask(config, mesh), make_optimizer(config), mesh)
    for path, leaf in paths(state.params):
        if leaf.ndim > 1 and "kernel" in path:
            assert any(leaf.sharding.spec), path
