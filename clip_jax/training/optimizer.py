"""Optax optimizers and schedules from the config."""

import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from clip_jax.config import ExperimentConfig

# Biases, norms, layer scales, position, segment, class and register embeddings, the probe of
# attention pooling, logit scale.
_NO_DECAY = re.compile(
    r"(bias|scale|(position|segment|class|register)_embedding|probe|log_logit_scale|logit_bias)$"
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


def make_optimizer(
    config: ExperimentConfig, trainable: Callable[[str], bool] | None = None
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov & Hutter 2019).

    trainable: which parameters it moves, by path; the others stay to the bit and have no moments.
    None: all.
    """
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
    chain = optax.chain(clip, adamw)
    if trainable is None or not config.start.lock:
        return chain

    def labels(params: Any) -> Any:
        def label(path: tuple[Any, ...], _: Any) -> str:
            moves = trainable(jax.tree_util.keystr(path, simple=True, separator="/"))
            return "trained" if moves else "locked"

        return jax.tree_util.tree_map_with_path(label, params)

    return optax.partition({"trained": chain, "locked": optax.set_to_zero()}, labels)
