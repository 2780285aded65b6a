import dataclasses

import pytest
from small import small_config

from clip_jax.config import PRESETS, ConfigError, TextTowerConfig, preset
from clip_jax.config.packing import check_packed_batch, check_packing, choose_group_size
from clip_jax.config.schema import PackingConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "bert", "pooling": "class_token", "causal": False}, "'bert' attends both ways"),
        ({"kind": "cbow", "pooling": "mean"}, "'cbow' is a mean over the row"),
        ({"causal": False, "pooling": "last"}, r"to padding, .* \(SigLIP\)"),
        ({"pooling": "mean"}, "pooling 'mean' reads other tokens"),
        ({"eot_id": None}, "eot_id None"),
    ],
)
def test_towers_whose_embeddings_would_change_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        check_packing(TextTowerConfig(**changes))
    assert "\n" not in str(error.value)
    assert "group_size=0" in str(error.value)


def test_clip_is_packed_and_siglip_is_not():
    check_packing(preset("ViT-B-32").text)
    name = next(name for name in PRESETS if name.startswith("ViT-B-16-SigLIP"))
    with pytest.raises(ConfigError, match="SigLIP"):
        check_packing(preset(name).text)


def packed_config(group_size, **changes):
    config = small_config(**changes)
    data = dataclasses.replace(config.data, packing=PackingConfig(group_size=group_size))
    return dataclasses.replace(config, data=data)


def test_groups_lie_within_a_microbatch_of_a_device():
    config = packed_config(8, global_batch_size=128, microbatches=2)
    check_packed_batch(config, 8)
    check_packed_batch(packed_config(0, global_batch_size=30), 8)
    with pytest.raises(
        ConfigError,
        match=r"group_size 8 does not divide the 4 samples of a device in a microbatch "
        r"\(global_batch_size 128 / 16 data-parallel devices / 2 microbatches\); nearest: 4",
    ):
        check_packed_batch(config, 16)
    with pytest.raises(ConfigError, match=r"group_size 48 does not divide the 128 .* nearest: 32"):
        check_packed_batch(packed_config(48, global_batch_size=128))


@pytest.mark.parametrize(
    ("changes", "num_devices", "expected"),
    [
        ({"global_batch_size": 32_768}, 8, 64),
        ({"global_batch_size": 90_112}, 64, 64),  # 1,408 each
        ({"global_batch_size": 33_792}, 176, 64),  # 192 each
        ({"global_batch_size": 128, "microbatches": 2}, 2, 32),
        ({"global_batch_size": 24}, 1, 8),
        ({"global_batch_size": 28}, 1, 0),  # less than eight share rows: little is saved
    ],
)
def test_the_largest_group_that_every_device_holds_whole(changes, num_devices, expected):
    config = small_config(**changes)
    group = choose_group_size(config, num_devices)
    assert group == expected
    data = dataclasses.replace(config.data, packing=PackingConfig(group_size=group))
    check_packed_batch(dataclasses.replace(config, data=data), num_devices)


def test_no_group_where_packing_would_not_be_exact():
    config = small_config(global_batch_size=32_768)
    text = dataclasses.replace(config.model.text, causal=False, pooling="last")
    model = dataclasses.replace(config.model, text=text)
    assert choose_group_size(dataclasses.replace(config, model=model), 8) == 0
