"""Lengths given in samples or epochs, as steps."""

import dataclasses
import math
from typing import Any

from clip_jax.config.errors import ConfigError
from clip_jax.config.schema import ExperimentConfig


def resolve_lengths(
    config: ExperimentConfig, samples_per_epoch: int | None = None
) -> ExperimentConfig:
    """`config` with `num_steps`, `warmup_steps` and `cooldown_steps` from samples or epochs.

    samples_per_epoch: counted in the sources; `epoch_samples` comes before it, and holds it in what
    is returned. Lengths in epochs stay as they are while both are None. `num_steps` is whole
    batches; the others are rounded to the nearest step, at least one where they are not 0.

    Raises ConfigError where a length is given in two units, or the run is less than one batch; once
    the sources are counted, also where a length exceeds the run.
    """
    batch = config.global_batch_size
    if batch < 1:
        return config  # `validate` says so
    if _in_epochs(config) and config.epoch_samples is None:
        config = dataclasses.replace(config, epoch_samples=samples_per_epoch)
    samples = _samples(config, "num_samples_seen", "num_epochs")
    if samples is not None:
        if samples < batch:
            given = "num_epochs" if config.num_samples_seen is None else "num_samples_seen"
            counted = f" = {samples} samples" if given == "num_epochs" else ""
            raise ConfigError(
                f"config.{given} {getattr(config, given)}{counted} is less than one batch: "
                f"global_batch_size {batch}"
            )
        config = dataclasses.replace(config, num_steps=samples // batch)
    steps: dict[str, Any] = {}
    for name in ("warmup", "cooldown"):
        samples = _samples(config, f"schedule.{name}_samples", f"schedule.{name}_epochs")
        if samples is not None:
            steps[f"{name}_steps"] = max(round(samples / batch), 1) if samples else 0
    schedule = dataclasses.replace(config.schedule, **steps)
    config = dataclasses.replace(config, schedule=schedule)
    if samples_per_epoch is not None:
        check_lengths(config)
    return config


def lengths_are_known(config: ExperimentConfig) -> bool:
    """False where a length in epochs waits for the samples of the sources to be counted."""
    return config.epoch_samples is not None or not _in_epochs(config)


def check_lengths(config: ExperimentConfig) -> None:
    """Raises ConfigError where warmup and cooldown do not fit into the run."""
    if not lengths_are_known(config):
        return
    schedule, steps = config.schedule, config.num_steps
    for name, length in (("warmup", schedule.warmup_steps), ("cooldown", schedule.cooldown_steps)):
        if length > steps:
            raise ConfigError(
                f"config.schedule.{name}_steps {length}{_given_as(config, name)} is more than "
                f"num_steps {steps}; set config.schedule.{name}_steps too, to {steps} or less"
            )
    both = schedule.warmup_steps + schedule.cooldown_steps
    if both > steps:
        raise ConfigError(
            f"config.schedule.warmup_steps {schedule.warmup_steps} and cooldown_steps "
            f"{schedule.cooldown_steps} are {both} together, more than num_steps {steps}"
        )


def _in_epochs(config: ExperimentConfig) -> bool:
    schedule = config.schedule
    lengths = (config.num_epochs, schedule.warmup_epochs, schedule.cooldown_epochs)
    return any(length is not None for length in lengths)


def _samples(config: ExperimentConfig, samples_key: str, epochs_key: str) -> int | None:
    """A length in samples; None where it is given in steps or not known yet."""
    samples, epochs = field_of(config, samples_key), field_of(config, epochs_key)
    if samples is not None and epochs is not None:
        raise ConfigError(
            f"config.{samples_key} {samples} and config.{epochs_key} {epochs} give one length in "
            f"two units; unset one: --config.{epochs_key}=None"
        )
    if epochs is not None:
        if not math.isfinite(epochs):
            raise ConfigError(f"config.{epochs_key} must be finite, got {epochs}")
        return None if config.epoch_samples is None else round(epochs * config.epoch_samples)
    assert samples is None or isinstance(samples, int)
    return samples


def field_of(config: ExperimentConfig, key: str) -> Any:
    """The field at `key` ('schedule.warmup_steps')."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _given_as(config: ExperimentConfig, name: str) -> str:
    """` (warmup_epochs 2.0)` where the length was given so."""
    for unit in ("samples", "epochs"):
        if (value := getattr(config.schedule, f"{name}_{unit}")) is not None:
            return f" ({name}_{unit} {value})"
    return ""
