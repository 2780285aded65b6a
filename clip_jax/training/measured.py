"""What a config leaves to be measured from the data: measured once, then kept with the run."""

import dataclasses
from collections.abc import Mapping

import jax

from clip_jax.checkpoint import Workdir
from clip_jax.config import (
    ConfigError,
    ExperimentConfig,
    PackingConfig,
    check_devices,
    resolve_lengths,
)
from clip_jax.config.packing import check_packed_batch
from clip_jax.data.configured_text import choose_packing
from clip_jax.data.record import Source
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.parallel import from_first_process, on_all_processes


def keep_measured(config: ExperimentConfig, workdir: Workdir) -> ExperimentConfig:
    """The config with what the run in `workdir` has measured before, of the same sources.

    Those are the samples of an epoch and, for the same captions, the groups that share rows and
    their rows. Else they are measured anew. Raises ConfigError where the mesh does not fit the
    devices.
    """
    if not from_first_process(workdir.exists()):
        return config
    saved = workdir.load_config()
    if config.data.sources != saved.data.sources:
        return config
    if config.epoch_samples is None:
        config = dataclasses.replace(config, epoch_samples=saved.epoch_samples)
    if config.model.text.context_length == saved.model.text.context_length:
        config = _with_packing(config, _kept_packing(config, saved.data.packing))
    return resolve_lengths(config, config.epoch_samples)


def _kept_packing(config: ExperimentConfig, saved: PackingConfig) -> PackingConfig:
    """That of the saved run where it is the one asked for; a chosen group must fit the devices."""
    packing = config.data.packing
    if packing.group_size is not None:
        same = packing.rows is None and packing.group_size == saved.group_size
        return saved if same else packing
    data, fsdp, _ = check_devices(config, jax.device_count())
    try:
        check_packed_batch(_with_packing(config, saved), data * fsdp)
    except ConfigError:
        return packing  # more devices than it was chosen for: smaller groups, the same embeddings
    return saved


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


def measure_packing(
    config: ExperimentConfig,
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    *,
    num_devices: int = 1,
) -> ExperimentConfig:
    """The config with `data.packing` chosen from captions where it is not given.

    num_devices: those that share the batch. All processes get what the first one measures. Raises
    UserError as `choose_packing` does.
    """
    packing = config.data.packing
    if packing.group_size == 0 or packing.rows is not None:
        return config

    def choose() -> PackingConfig:
        if jax.process_index():  # a bucket need not answer all of them
            return PackingConfig(group_size=0)
        return choose_packing(config, sources, tokenizer, num_devices=num_devices)

    chosen = on_all_processes(choose)
    group = from_first_process(chosen.group_size or 0)
    rows = from_first_process(chosen.rows or 0)
    return _with_packing(config, PackingConfig(group_size=group, rows=rows or None))


def _with_packing(config: ExperimentConfig, packing: PackingConfig) -> ExperimentConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, packing=packing))
