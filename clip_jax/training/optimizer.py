"""Optax optimizers and schedules from the config."""

import re
from typing import Any

import jax
import optax

from clip_jax.config import ExperimentConfig

# Biases, norms, positional and class embeddings, the probe of attention pooling, logit scale.
_NO_DECAY = re.compile(
    r"(bias|scale|position_embedding|class_embedding|probe|log_logit_scale|logit_bias)$"
)


def make_schedule(config: ExperimentConfig) -> optax.Schedule:
    """Step to learning rate: linear warmup from 0, then `schedule.name` to the last step."""
    schedule, peak = config.schedule, config.optimizer.learning_rate
    if schedule.name == "constant":
        after = optax.constant_schedule(peak)
    else:
        decay_steps = max(config.num_steps - schedule.warmup_steps, 1)
        after = optax.cosine_decay_schedule(peak, decay_steps, alpha=schedule.end_fraction)
    if schedule.warmup_steps == 0:
        return after
    # The first update already moves the weights: 1/warmup of the peak, not 0.
    first = peak / schedule.warmup_steps
    warmup = optax.linear_schedule(first, peak, max(schedule.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [schedule.warmup_steps])


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay pulls to zero: matrices, token embedding."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return not _NO_DECAY.search(jax.tree_util.keystr(path, simple=True, separator="/"))

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: ExperimentConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov & Hutter 2019)."""
    optimizer = config.optimizer
    clip = (
        optax.clip_by_global_norm(optimizer.clip_global_norm)
        if optimizer.clip_global_norm is not None
        else optax.identity()
    )
    adamw = optax.adamw(
        make_schedule(config),
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(clip, adamw)
