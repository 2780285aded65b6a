"""Checks of how a run learns: optimizer, learning rates, lengths, stability."""

import math
import re

from clip_jax.config.errors import ConfigError
from clip_jax.config.lengths import check_lengths, field_of, lengths_are_known
from clip_jax.config.schema import ExperimentConfig

_POSITIVE = (
    "num_epochs",
    "epoch_samples",
    "optimizer.image.multiplier",
    "optimizer.text.multiplier",
    "schedule.timescale_steps",
    "stability.max_skipped_steps",
    "stability.spike_zscore",
    "stability.spike_steps",
)
_NOT_NEGATIVE = (
    "schedule.warmup_samples",
    "schedule.warmup_epochs",
    "schedule.cooldown_steps",
    "schedule.cooldown_samples",
    "schedule.cooldown_epochs",
    "stability.max_rewinds",
)


def check_optimizer(config: ExperimentConfig) -> None:
    """Raises ConfigError for what optimizer, schedule or stability cannot mean."""
    for key in (*_POSITIVE, *_NOT_NEGATIVE):
        value = field_of(config, key)
        if value is not None and (value < 0 or (value == 0 and key in _POSITIVE)):
            spelled = "positive" if key in _POSITIVE else "0 or more"
            raise ConfigError(f"config.{key} must be {spelled}, got {value}")
    for name in ("no_decay", "frozen"):
        for pattern in getattr(config.optimizer, name):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"config.optimizer.{name} {pattern!r} is not a regular expression: {error}"
                ) from None
    for tower in ("image", "text"):
        _check_tower(config, tower)
    if config.optimizer.name == "muon" and not any(
        _has_blocks(config, tower) for tower in ("image", "text")
    ):
        raise ConfigError(
            "config.optimizer.name 'muon' is for the blocks of Transformers, and this model has "
            "none; use config.optimizer.name=adamw"
        )
    _check_schedule(config)
    # A median of fewer says nothing.
    if config.stability.spike_window < 8:
        raise ConfigError(
            f"config.stability.spike_window must be 8 or more, got {config.stability.spike_window}"
        )


def _check_tower(config: ExperimentConfig, tower: str) -> None:
    rates, model = getattr(config.optimizer, tower), getattr(config.model, tower)
    field = f"config.optimizer.{tower}"
    if not 0 < rates.layer_decay <= 1:
        raise ConfigError(
            f"{field}.layer_decay must be above 0 and at most 1, got {rates.layer_decay}"
        )
    if not _has_blocks(config, tower) and (rates.layer_decay != 1 or rates.frozen_layers):
        raise ConfigError(
            f"{field}.layer_decay {rates.layer_decay} and frozen_layers {rates.frozen_layers} are "
            f"for the blocks of a Transformer, which config.model.{tower}.kind '{model.kind}' is "
            f"not; use {field}.multiplier or config.optimizer.frozen"
        )
    if _has_blocks(config, tower) and not 0 <= rates.frozen_layers <= model.depth:
        raise ConfigError(
            f"{field}.frozen_layers must be 0 to the {model.depth} layers of "
            f"config.model.{tower}.depth, got {rates.frozen_layers}"
        )


def _check_schedule(config: ExperimentConfig) -> None:
    schedule = config.schedule
    for unit in ("steps", "samples", "epochs"):
        cooldown = getattr(schedule, f"cooldown_{unit}")
        if cooldown and schedule.name not in ("rsqrt", "wsd"):
            raise ConfigError(
                f"config.schedule.cooldown_{unit} {cooldown} is for 'rsqrt' and 'wsd', and "
                f"config.schedule.name is '{schedule.name}'; leave it out, or use "
                "config.schedule.name=wsd"
            )
    check_lengths(config)
    if schedule.name == "rsqrt" and lengths_are_known(config):
        decayed = config.num_steps - schedule.cooldown_steps - schedule.warmup_steps
        share = 1 / math.sqrt(1 + decayed / schedule.timescale_steps)
        if schedule.cooldown_steps and share < schedule.end_fraction:
            raise ConfigError(
                f"config.schedule.end_fraction {schedule.end_fraction} is more than the share "
                f"{share:.3g} of the peak that 'rsqrt' falls to before its cooldown; use less"
            )


def _has_blocks(config: ExperimentConfig, tower: str) -> bool:
    kind: str = getattr(config.model, tower).kind
    return kind not in ("resnet", "cbow")
