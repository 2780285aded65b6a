import dataclasses

import pytest
from small import small_config

from clip_jax.config import ConfigError, ScheduleConfig
from clip_jax.config.lengths import check_lengths, lengths_are_known, resolve_lengths


def config_of(schedule=None, **changes):
    """10 steps of 32 samples, where `changes` say nothing else."""
    return small_config(schedule=ScheduleConfig(warmup_steps=2, **(schedule or {})), **changes)


def lengths(config):
    schedule = config.schedule
    return config.num_steps, schedule.warmup_steps, schedule.cooldown_steps


def test_lengths_in_steps_stay():
    config = config_of()
    assert resolve_lengths(config) == resolve_lengths(config, 1000) == config


def test_samples_are_whole_batches_of_the_run_and_nearest_steps_of_its_parts():
    schedule = {"name": "wsd", "warmup_samples": 79, "cooldown_samples": 81}
    assert lengths(resolve_lengths(config_of(schedule, num_samples_seen=32 * 11 - 1))) == (10, 2, 3)
    # A length that is asked for is never rounded away.
    assert lengths(resolve_lengths(config_of({"warmup_samples": 1})))[1] == 1
    assert lengths(resolve_lengths(config_of({"warmup_samples": 0})))[1] == 0


def test_epochs_wait_until_the_sources_are_counted():
    schedule = {"name": "wsd", "warmup_epochs": 0.5, "cooldown_epochs": 1.0}
    config = config_of(schedule, num_epochs=4.5)
    waiting = resolve_lengths(config)
    assert waiting == config
    assert not lengths_are_known(waiting)
    resolved = resolve_lengths(waiting, 320)
    assert lengths(resolved) == (45, 5, 10)
    assert lengths_are_known(resolved)
    # It says by itself how long it is, so that a saved config does; what the user says counts.
    assert resolved.epoch_samples == 320
    assert resolve_lengths(resolved, 64) == resolved
    assert resolve_lengths(dataclasses.replace(config, epoch_samples=640)).num_steps == 90


def test_a_length_in_steps_beside_one_in_epochs():
    config = config_of({"warmup_epochs": 0.25})
    check_lengths(dataclasses.replace(config, num_steps=1))  # 2 steps are the default, not said
    assert lengths(resolve_lengths(config, 320)) == (10, 2, 0)
    assert lengths(resolve_lengths(config, 1280)) == (10, 10, 0)


@pytest.mark.parametrize(
    ("schedule", "changes", "message"),
    [
        (
            {},
            {"num_samples_seen": 320, "num_epochs": 2.0},
            "config.num_samples_seen 320 and config.num_epochs 2.0 give one length in two units; "
            "unset one: --config.num_epochs=None",
        ),
        (
            {"warmup_samples": 1, "warmup_epochs": 2.0},
            {},
            "config.schedule.warmup_samples 1 and config.schedule.warmup_epochs 2.0 give one",
        ),
        ({}, {"num_samples_seen": 31}, "num_samples_seen 31 is less than one batch: global_batch"),
        ({}, {"num_epochs": 0.01}, "num_epochs 0.01 = 3 samples is less than one batch"),
        ({"warmup_epochs": 2.0}, {}, "warmup_steps 20 .warmup_epochs 2.0. is more than num_steps"),
        (
            {"name": "wsd", "cooldown_samples": 288},
            {},
            "warmup_steps 2 and cooldown_steps 9 are 11 together, more than num_steps 10",
        ),
        ({"warmup_epochs": float("inf")}, {}, "schedule.warmup_epochs must be finite, got inf"),
    ],
)
def test_what_does_not_fit_is_one_line(schedule, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        resolve_lengths(config_of(schedule, **changes), 320)
    assert "\n" not in str(error.value)
