"""What a config leaves to be measured from the data: measured once, then kept with the run."""

import dataclasses
from collections.abc import Mapping

from clip_jax.checkpoint import Workdir
from clip_jax.config import ConfigError, ExperimentConfig, resolve_lengths
from clip_jax.data.configured_text import packing_rows
from clip_jax.data.record import Source
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.parallel import from_first_process


def keep_measured(config: ExperimentConfig, workdir: Workdir) -> ExperimentConfig:
    """The config with what the run in `workdir` has measured before, of the same sources.

    Those are the samples of an epoch and, for the same captions in the same groups, the rows of a
    group. Else they are measured anew.
    """
    if not from_first_process(workdir.exists()):
        return config
    saved = workdir.load_config()
    if config.data.sources != saved.data.sources:
        return config
    if config.epoch_samples is None:
        config = dataclasses.replace(config, epoch_samples=saved.epoch_samples)
    packing, saved_packing = config.data.packing, saved.data.packing
    same_length = config.model.text.context_length == saved.model.text.context_length
    if packing.rows is None and packing.group_size == saved_packing.group_size and same_length:
        config = _with_rows(config, saved_packing.rows)
    return resolve_lengths(config, config.epoch_samples)


def count_epochs(config: ExperimentConfig, sources: Mapping[str, Source]) -> ExperimentConfig:
    """The config with steps in place of epochs; an epoch is as many samples as there are.

    Raises ConfigError where the sources cannot say how many.
    """
    schedule = config.schedule
    given = (config.num_epochs, schedule.warmup_epochs, schedule.cooldown_epochs)
    if all(epochs is None for epochs in given):
        return config
    if config.epoch_samples is None:
        if config.data.streams:
            raise ConfigError(
                "config.epoch_samples must be given where lengths are in epochs and sources "
                "stream; clip-jax data check counts the samples"
            )
        total = sum(map(len, sources.values()))
        config = dataclasses.replace(config, epoch_samples=total)
    return resolve_lengths(config, config.epoch_samples)


def measure_packing_rows(
    config: ExperimentConfig, sources: Mapping[str, Source], tokenizer: Tokenizer
) -> ExperimentConfig:
    """The config with `data.packing.rows`, chosen from captions where it is not given.

    All processes get what the first one measures. Raises UserError as `packing_rows` does.
    """
    rows = packing_rows(config, sources, tokenizer)
    if rows is None or rows == config.data.packing.rows:
        return config
    return _with_rows(config, from_first_process(rows))


def _with_rows(config: ExperimentConfig, rows: int | None) -> ExperimentConfig:
    packing = dataclasses.replace(config.data.packing, rows=rows)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, packing=packing))
