"""All that a step changes, and how it comes to lie on the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from clip_jax.parallel import state_shardings
from clip_jax.tasks import Task

Array = jax.Array


class TrainState(NamedTuple):
    step: Array  # int32, updates done so far
    params: dict[str, Any]
    model_state: dict[str, Any]
    opt_state: Any
    ema: dict[str, Any]  # moving average of the parameters; {} where none is kept
    skipped: dict[str, Array]  # int32, updates left out: 'total', and 'in_row' up to now


def abstract_state(
    task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, *, ema: bool = False
) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is allocated.

    ema: whether a moving average of the parameters is part of it.
    """
    shapes = jax.eval_shape(lambda rng: _new_state(task, optimizer, rng, ema), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, mesh),
    )


def init_state(
    task: Task, optimizer: optax.GradientTransformation, abstract: TrainState, seed: int
) -> TrainState:
    """A fresh state, made where it lies: no device ever holds all of it."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    ema = bool(abstract.ema)
    init = jax.jit(lambda rng: _new_state(task, optimizer, rng, ema), out_shardings=shardings)
    return init(jax.random.key(seed))


def _new_state(
    task: Task, optimizer: optax.GradientTransformation, rng: Array, ema: bool
) -> TrainState:
    params, model_state = task.init(rng)
    # A copy: the state is donated, and no buffer may be in it twice.
    average = jax.tree.map(jnp.copy, params) if ema else {}
    skipped = {"in_row": jnp.int32(0), "total": jnp.int32(0)}
    return TrainState(jnp.int32(0), params, model_state, optimizer.init(params), average, skipped)


def count_parameters(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
