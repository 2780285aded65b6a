"""Schedules beside big_vision's formulas and optax's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import small_config

from clip_jax.config import OptimizerConfig, ScheduleConfig
from clip_jax.training.schedule import make_schedule

NUM_STEPS = 1000
STEPS = np.arange(NUM_STEPS + 1)


def rates(**schedule):
    """The learning rate at each step, and at the one after the last; the peak is 2."""
    config = dataclasses.replace(
        small_config(),
        num_steps=NUM_STEPS,
        optimizer=OptimizerConfig(learning_rate=2.0),
        schedule=ScheduleConfig(**schedule),
    )
    return np.asarray(make_schedule(config)(jnp.asarray(STEPS)))


def big_vision(decay_type, *, warmup, cooldown=0, timescale=10_000, end=0.0):
    """big_vision's utils.create_learning_rate_schedule, in float64."""
    progress = np.clip((STEPS - warmup) / (NUM_STEPS - warmup), 0, 1)
    rate = {
        "linear": end + (2.0 - end) * (1 - progress),
        "cosine": 2.0 * 0.5 * (1 + np.cos(np.pi * progress)),
        "rsqrt": 2.0 / np.sqrt(1 + np.maximum(STEPS - warmup, 0) / timescale),
    }[decay_type]
    if warmup:
        rate = rate * np.minimum(1, STEPS / warmup)
    if cooldown:
        rate = rate * np.minimum(1, (NUM_STEPS - STEPS) / cooldown)
    return rate


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("cosine", {}, {}),
        ("linear", {"end_fraction": 0.1}, {"end": 0.2}),
        ("rsqrt", {"timescale_steps": 70}, {"timescale": 70}),
        (
            "rsqrt",
            {"timescale_steps": 70, "cooldown_steps": 300},
            {"timescale": 70, "cooldown": 300},
        ),
    ],
)
def test_rates_are_big_visions(name, ours, theirs):
    here = rates(name=name, warmup_steps=50, **ours)
    there = big_vision(name, warmup=50, **theirs)
    np.testing.assert_allclose(here[50:], there[50:], rtol=2e-5, atol=1e-6)
    # Our warmup is one step ahead: its first update is not 0.
    np.testing.assert_allclose(here[:49], there[1:50], rtol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_rates_are_optaxs(name):
    here = rates(name=name, warmup_steps=0, end_fraction=0.25)
    there = {
        "cosine": optax.cosine_decay_schedule(2.0, NUM_STEPS, alpha=0.25),
        "linear": optax.linear_schedule(2.0, 0.5, NUM_STEPS),
    }[name]
    np.testing.assert_allclose(here, there(jnp.asarray(STEPS)), rtol=1e-6)


def test_warmup_then_cosine_to_the_end_fraction():
    rate = rates(warmup_steps=10, end_fraction=0.1)
    np.testing.assert_allclose(rate[[0, 4, 9, 10]], [0.2, 1.0, 2.0, 2.0], rtol=1e-6)
    # Half way down: the mean of peak and end. The step after the last would be the end itself.
    np.testing.assert_allclose(rate[[505, 1000]], [1.1, 0.2], rtol=1e-5)


def test_no_warmup_and_constant():
    np.testing.assert_array_equal(rates(name="constant", warmup_steps=0), 2.0)
    assert (rates(name="constant", warmup_steps=1) == 2.0).all()


def test_wsd_stays_and_then_cools_down():
    common = {"name": "wsd", "warmup_steps": 10, "cooldown_steps": 200, "end_fraction": 0.1}
    share = np.clip((STEPS - 800) / 200, 0, 1)  # of the cooldown
    linear, sqrt = rates(**common), rates(**common, cooldown_shape="sqrt")
    np.testing.assert_array_equal(linear[10:801], 2.0)
    np.testing.assert_allclose(linear[10:], 0.2 + 1.8 * (1 - share[10:]), rtol=1e-5)
    np.testing.assert_allclose(sqrt[10:], 0.2 + 1.8 * (1 - np.sqrt(share[10:])), rtol=1e-5)
    # Without a cooldown it is the run that others branch from.
    np.testing.assert_array_equal(rates(**common | {"cooldown_steps": 0})[10:], 2.0)


def test_a_cooldown_ends_at_the_end_fraction_of_the_peak():
    rate = rates(
        name="rsqrt", warmup_steps=5, timescale_steps=100, cooldown_steps=100, end_fraction=0.05
    )
    assert rate[-1] == pytest.approx(0.1)
    assert (np.diff(rate[5:]) < 0).all()


def test_a_schedule_is_evaluated_at_traced_steps():
    schedule = make_schedule(small_config())
    steps = jnp.arange(10, dtype=jnp.int32)
    np.testing.assert_allclose(
        jax.jit(schedule)(steps), [float(schedule(step)) for step in range(10)], rtol=1e-6
    )
