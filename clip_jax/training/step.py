"""One update of the weights, compiled once for the whole run."""

from collections.abc import Callable, Mapping

import jax
import optax
from jax.sharding import Mesh

from clip_jax.parallel import batch_sharding, replicated
from clip_jax.tasks import Task
from clip_jax.training.state import TrainState

Array = jax.Array
TrainStep = Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    abstract: TrainState,
    mesh: Mesh,
    *,
    seed: int,
    ema_decay: float | None = None,
) -> TrainStep:
    """The jitted step: (state, batch) -> (state, metrics). The state is donated.

    ema_decay: of the moving average of the parameters, where `abstract` holds one.

    Inputs and outputs have the shardings of `abstract`, so the step's result is its next input
    and it never compiles twice.
    """

    def train_step(
        state: TrainState, batch: Mapping[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, (model_state, metrics)), gradients = jax.value_and_grad(task.loss, has_aux=True)(
            state.params, state.model_state, batch, rng=rng, step=state.step
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = task.constrain(optax.apply_updates(state.params, updates))
        ema = state.ema
        if ema_decay is not None:
            ema = optax.incremental_update(params, ema, 1 - ema_decay)
        metrics = metrics | {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, model_state, opt_state, ema), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
