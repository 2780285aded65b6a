import pytest
from config.test_validation import changed

from clip_jax.config import ConfigError, validate
from clip_jax.config.load import load_config

STREAM = {"data__sources__pairs__access": "stream"}
PACKED = {"data__packing__group_size": 8}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__sources__pairs__caption_weights": [1.0]}, "has 1 entries and caption_keys 0"),
        (
            {
                "data__sources__pairs__caption_keys": ["txt", "alt"],
                "data__sources__pairs__caption_weights": [0, 0],
            },
            "must be 0 or more, not all 0",
        ),
        ({"data__sources__pairs__templates": ["a photo"]}, "prompts that contain {}"),
        (
            STREAM | {"data__sources__pairs__kind": "folder"},
            "access 'stream' is for tars; kind 'folder' needs access=random",
        ),
        (STREAM | {"data__repeat": False}, "repeat=False needs sources with access 'random'"),
        (
            STREAM | {"data__stream__num_streams": 12},
            "num_streams 12 does not divide global_batch_size 32; the next below that does is 8",
        ),
        ({"data__skipped_ranges": [[5, 5]]}, "0 <= from < to, got (5, 5)"),
        ({"data__augment__rand_augment_magnitude": 31}, "between 0 and 30, got 31"),
        (
            {"data__packing__group_size": 12},
            "group_size 12 does not divide the 32 samples of a device in a microbatch",
        ),
        (PACKED | {"data__packing__rows": 9}, "rows 9 is more than group_size 8"),
        ({"data__packing__rows": 9}, "rows 9 is of a group whose size is not given"),
        (PACKED | {"model__text__causal": False}, "packing"),
        ({"data__stream__window": 0}, "config.data.stream.window must be positive, got 0"),
    ],
)
def test_what_does_not_fit(overrides, message):
    with pytest.raises(ConfigError) as caught:
        validate(changed(**overrides))
    assert message in str(caught.value)


def test_streams_and_random_access_do_not_mix():
    config = changed(data__sources={"a": {"path": "a.tar"}, "b": {"path": "b", "access": "stream"}})
    with pytest.raises(ConfigError, match=r"sources\.a\.access is 'random' and others stream"):
        validate(config)


@pytest.mark.parametrize("overrides", [STREAM | {"data__stream__num_streams": 8}, PACKED])
def test_what_fits(overrides):
    config = changed(**overrides)
    assert validate(config) == config


def test_samples_seen_set_the_steps():
    recipe = ["--config=configs/quickstart.py", "--config.num_samples_seen=12900"]
    config = load_config([*recipe, "--config.schedule.warmup_steps=10"])
    assert (config.global_batch_size, config.num_steps) == (128, 100)
    with pytest.raises(ConfigError, match="num_samples_seen 100 is less than one batch"):
        load_config([*recipe[:1], "--config.num_samples_seen=100"])
