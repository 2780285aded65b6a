"""What parameters and optimizer take of a device under any mesh, from shapes alone."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from clip_jax.config import ExperimentConfig
from clip_jax.models import Execution
from clip_jax.parallel import MESH_AXES
from clip_jax.parallel.sharding import state_shardings
from clip_jax.planning.plan_setting import StateBytes
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import TrainState, abstract_state


def state_bytes(config: ExperimentConfig) -> Callable[[tuple[int, int, int]], StateBytes]:
    """A function of the mesh (data, fsdp, tensor). Nothing is allocated or compiled."""
    one = _mesh((1, 1, 1))
    execution = Execution.for_backend("cpu", precision=config.precision)
    task = ContrastiveTask(config, one, execution=execution)
    ema = config.optimizer.ema_decay is not None
    optimizer = make_optimizer(config, task.trainable)
    state: TrainState = abstract_state(task, optimizer, one, ema=ema)

    def of(mesh: tuple[int, int, int]) -> StateBytes:
        abstract = _mesh(mesh)
        total = _device_bytes(state, abstract)
        parameters = _device_bytes({"params": state.params}, abstract)
        return StateBytes(parameters, total - parameters)

    return of


def _device_bytes(tree: Any, mesh: Any) -> int:
    shardings = state_shardings(tree, mesh)
    return sum(
        leaf.dtype.itemsize * math.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )


def _mesh(sizes: tuple[int, int, int]) -> Any:  # it has shapes and names, and no devices
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
