"""One update of the weights, compiled once for the whole run."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from clip_jax.parallel import batch_sharding, replicated
from clip_jax.tasks import Task
from clip_jax.training.norms import layer_norms
from clip_jax.training.state import TrainState

Array = jax.Array
TrainStep = Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    abstract: TrainState,
    mesh: Mesh,
    *,
    seed: int,
    ema_decay: float | None = None,
    with_layer_norms: bool = False,
) -> TrainStep:
    """The jitted step: (state, batch) -> (state, metrics). The state is donated.

    ema_decay: of the moving average of the parameters, where `abstract` holds one.
    with_layer_norms: metrics have the norms of `layer_norms` too, as vectors over layers.

    Where the loss or a gradient is not finite, all but the step and its counts stays as it was, on
    the device: the host need not know. Inputs and outputs have the shardings of `abstract`, so the
    step's result is its next input and it never compiles twice.
    """

    def train_step(
        state: TrainState, batch: Mapping[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, (model_state, metrics)), gradients = jax.value_and_grad(task.loss, has_aux=True)(
            state.params, state.model_state, batch, rng=rng, step=state.step
        )
        gradient_norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(
            gradients, state.opt_state, state.params, step=state.step
        )
        params = task.constrain(optax.apply_updates(state.params, updates))
        ema = state.ema
        if ema_decay is not None:
            ema = optax.incremental_update(params, ema, 1 - ema_decay)
        # A norm is finite only where every gradient is.
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        params, model_state, opt_state, ema = _where(
            finite,
            (params, model_state, opt_state, ema),
            (state.params, state.model_state, state.opt_state, state.ema),
        )
        skipped = {
            "in_row": jnp.where(finite, 0, state.skipped["in_row"] + 1),
            "total": state.skipped["total"] + ~finite,
        }
        metrics = metrics | {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "learning_rate": schedule(state.step),
            "skipped_steps": skipped["total"],
            "skipped_steps_in_row": skipped["in_row"],
        }
        if with_layer_norms:
            metrics |= layer_norms(state.params, gradients, updates)
        state = TrainState(state.step + 1, params, model_state, opt_state, ema, skipped)
        return state, metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def _where(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
