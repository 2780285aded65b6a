"""The update of the weights: optax's rules and ours, in one order for all of them."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from clip_jax.config import ExperimentConfig, OptimizerConfig
from clip_jax.training.optimizer_adafactor import scale_by_adafactor
from clip_jax.training.optimizer_muon import scale_by_muon
from clip_jax.training.rates import (
    Trainable,
    learning_rate_factors,
    map_with_path,
    of_what_trains,
)
from clip_jax.training.schedule import make_schedule

Array = jax.Array


def make_optimizer(
    config: ExperimentConfig, trainable: Trainable | None = None, *, mesh: Mesh | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, the rule of `config.optimizer`, weight decay, learning rate.

    `update(gradients, state, params, *, step)` returns what is added to the parameters. The
    learning rate is that of `step` (int32, updates done so far): the state holds no counter of the
    schedule, so a run may keep an older state without shifting it.

    trainable: which parameters it moves, by path, beside what the config freezes; None: all. The
    others stay to the bit, have no moments and do not count in the norm. mesh: devices that share
    the work of 'muon', which each would do for itself otherwise.
    """
    optimizer = config.optimizer

    def factors(tree: Any) -> Any:
        return learning_rate_factors(config, tree, trainable)

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda factor: "trained" if factor.any() else "frozen", factors(params))

    clip = optimizer.clip_global_norm
    trained = optax.chain(
        optax.stateless(lambda gradients, _: of_what_trains(gradients, factors(gradients))),
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        _rule(config, mesh),
        optax.add_decayed_weights(
            optimizer.weight_decay, lambda params: decay_mask(params, optimizer.no_decay)
        ),
        _scale_by_learning_rate(make_schedule(config), factors),
    )
    frozen = optax.stateless(lambda gradients, _: jax.tree.map(_nothing, gradients))
    return optax.partition({"trained": trained, "frozen": frozen}, labels)


def decay_mask(params: Any, no_decay: Sequence[str] = OptimizerConfig.no_decay) -> Any:
    """True for the parameters that weight decay pulls to zero: matrices, token embedding.

    no_decay: regular expressions of the ends of paths that it leaves alone.
    """
    patterns = [re.compile(f"(?:{pattern})$") for pattern in no_decay]
    return map_with_path(lambda path, _: not any(p.search(path) for p in patterns), params)


def _rule(config: ExperimentConfig, mesh: Mesh | None) -> optax.GradientTransformation:
    """Gradients to the direction of the update, of the size of one: signs, for example."""
    optimizer = config.optimizer
    b1, b2, dtype = optimizer.b1, optimizer.b2, jnp.dtype(optimizer.first_moment_dtype)
    # Its second moment has the parameters' dtype, float32: a change of 1 - b2 is lost in bfloat16.
    adam = optax.scale_by_adam(b1, b2, optimizer.epsilon, mu_dtype=dtype)
    match optimizer.name:
        case "adamw":
            return adam
        case "lion":
            return optax.scale_by_lion(b1, b2, mu_dtype=dtype)
        case "adafactor":
            momentum = optax.ema(b1, debias=False, accumulator_dtype=dtype)
            factored = scale_by_adafactor(highest_decay=b2)
            return optax.chain(factored, momentum) if b1 else factored
        case "sgd":
            return optax.trace(b1, accumulator_dtype=dtype) if b1 else optax.identity()
        case "muon":
            return scale_by_muon(
                b1, otherwise=adam, dtype=jnp.dtype(config.precision), mu_dtype=dtype, mesh=mesh
            )


def _scale_by_learning_rate(schedule: optax.Schedule, factors: Any) -> Any:
    """The last link: `-learning_rate * factor`, at the `step` that `update` is given."""

    def update(
        updates: Any, state: Any, params: Any = None, *, step: Array, **_: Any
    ) -> tuple[Any, Any]:
        rate = schedule(step)

        def scaled(update: Array, factor: Any) -> Array:
            change = (-rate * factor) * update
            return change if factor.all() else jnp.where(factor > 0, change, -0.0)

        return jax.tree.map(scaled, updates, factors(updates)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _nothing(gradient: Array) -> Array:
    """Zeros that leave -0.0 what it is, when they are added."""
    return jnp.full_like(gradient, -0.0)
