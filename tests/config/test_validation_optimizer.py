import dataclasses

import pytest
from small import small_config, small_model

from clip_jax.config import (
    ConfigError,
    OptimizerConfig,
    ScheduleConfig,
    StabilityConfig,
    TowerRateConfig,
)
from clip_jax.config.validation_optimizer import check_optimizer

RESNET = {"kind": "resnet", "image_size": 32, "patch_size": 32, "resnet_layers": (1, 1, 1, 1)}


def with_towers(config, image=None, text=None):
    model = small_model()
    model = dataclasses.replace(
        model,
        image=dataclasses.replace(model.image, **(image or {})),
        text=dataclasses.replace(model.text, **(text or {})),
    )
    return dataclasses.replace(config, model=model)


def optimizer(**changes):
    return small_config(optimizer=OptimizerConfig(**changes))


def schedule(**changes):
    return small_config(schedule=ScheduleConfig(**{"warmup_steps": 1, **changes}))


def rates(**changes):
    return optimizer(image=TowerRateConfig(**changes))


REFUSED = {
    "multiplier": (rates(multiplier=0.0), "optimizer.image.multiplier must be positive, got 0.0"),
    "layer decay": (rates(layer_decay=1.5), "layer_decay must be above 0 and at most 1, got 1.5"),
    "too many layers": (rates(frozen_layers=3), "frozen_layers must be 0 to the 2 layers"),
    "layers of a resnet": (
        with_towers(rates(layer_decay=0.5), RESNET),
        "layer_decay 0.5 and frozen_layers 0 are for the blocks of a Transformer",
    ),
    "layers of a bag": (
        with_towers(optimizer(text=TowerRateConfig(frozen_layers=1)), text={"kind": "cbow"}),
        "config.model.text.kind 'cbow' is not; use config.optimizer.text.multiplier or",
    ),
    "muon without blocks": (
        with_towers(optimizer(name="muon"), RESNET, {"kind": "cbow"}),
        "'muon' is for the blocks of Transformers",
    ),
    "pattern": (optimizer(frozen=("(",)), r"optimizer.frozen '\(' is not a regular expression"),
    "decay pattern": (optimizer(no_decay=("*",)), "no_decay '.' is not a regular expression"),
    "cooldown of cosine": (
        schedule(cooldown_epochs=2.0),
        "cooldown_epochs 2.0 is for 'rsqrt' and 'wsd', and config.schedule.name is 'cosine'",
    ),
    "timescale": (schedule(timescale_steps=0), "schedule.timescale_steps must be positive, got 0"),
    "negative": (schedule(warmup_samples=-1), "schedule.warmup_samples must be 0 or more, got -1"),
    "warmup": (schedule(warmup_steps=11), "warmup_steps 11 is more than num_steps 10; set config"),
    "rsqrt below its end": (
        schedule(name="rsqrt", timescale_steps=1, cooldown_steps=2, end_fraction=0.5),
        "end_fraction 0.5 is more than the share 0.354 of the peak that 'rsqrt' falls to",
    ),
    "window": (
        small_config(stability=StabilityConfig(spike_window=2)),
        "stability.spike_window must be 8 or more, got 2",
    ),
    "zscore": (
        small_config(stability=StabilityConfig(spike_zscore=0.0)),
        "stability.spike_zscore must be positive, got 0.0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_one_line(name):
    config, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as error:
        check_optimizer(config)
    assert "\n" not in str(error.value)


def test_what_can_be_meant_passes():
    for config in (
        rates(multiplier=0.1, layer_decay=0.65, frozen_layers=2),
        with_towers(optimizer(name="muon"), RESNET),
        with_towers(rates(multiplier=0.5), RESNET),
        schedule(name="rsqrt", cooldown_steps=4),
        schedule(name="wsd", cooldown_samples=64),
        schedule(warmup_steps=2000, warmup_epochs=1.0),  # not counted yet
        small_config(stability=StabilityConfig(spike_zscore=6.0)),
    ):
        check_optimizer(config)
