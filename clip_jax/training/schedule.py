"""The learning rate by step."""

import jax
import jax.numpy as jnp
import optax

from clip_jax.config import ExperimentConfig, ScheduleConfig

Array = jax.Array


def make_schedule(config: ExperimentConfig) -> optax.Schedule:
    """Updates done so far to the learning rate of the next: warmup, then `schedule.name`.

    Linear warmup, whose first update already moves the weights: by 1/warmup of the peak, not 0.
    docs/optimizers.md has the formulas. Lengths are those in steps (`config.lengths`).
    """
    schedule, peak = config.schedule, config.optimizer.learning_rate
    after = _after_warmup(schedule, peak, config.num_steps)
    if schedule.warmup_steps:
        first = peak / schedule.warmup_steps
        warmup = optax.linear_schedule(first, peak, max(schedule.warmup_steps - 1, 1))
        after = optax.join_schedules([warmup, after], [schedule.warmup_steps])
    if schedule.name not in ("rsqrt", "wsd") or not schedule.cooldown_steps:
        return after
    return _with_cooldown(after, schedule, peak, config.num_steps)


def _after_warmup(schedule: ScheduleConfig, peak: float, num_steps: int) -> optax.Schedule:
    decay_steps = max(num_steps - schedule.warmup_steps, 1)
    match schedule.name:
        case "cosine":
            return optax.cosine_decay_schedule(peak, decay_steps, alpha=schedule.end_fraction)
        case "linear":
            return optax.linear_schedule(peak, peak * schedule.end_fraction, decay_steps)
        case "rsqrt":  # Zhai et al. 2022 and big_vision, whose timescale is 10,000 too
            return lambda step: peak * jax.lax.rsqrt(1 + step / schedule.timescale_steps)
        case "constant" | "wsd":
            return optax.constant_schedule(peak)


def _with_cooldown(
    before: optax.Schedule, schedule: ScheduleConfig, peak: float, num_steps: int
) -> optax.Schedule:
    """`before`, brought to `end_fraction` of the peak over the last `cooldown_steps`."""
    end = peak * schedule.end_fraction

    def rate(step: Array | int) -> Array:
        left = jnp.clip((num_steps - step) / schedule.cooldown_steps, 0, 1)
        if schedule.cooldown_shape == "sqrt":  # Haegele et al. 2024, equation 1
            left = 1 - jnp.sqrt(1 - left)
        return end + (before(step) - end) * left

    return rate
