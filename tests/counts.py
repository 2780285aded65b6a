"""What the compiled train step of a recipe costs, in counts: FLOPs, bytes, collectives."""

import collections
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
from recipes import shrunk
from small import mesh_of

from clip_jax.config import ExperimentConfig
from clip_jax.planning import Program
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.schedule import make_schedule
from clip_jax.training.state import abstract_state
from clip_jax.training.step import make_train_step

MESH = (2, 2, 2)


def counts_of(config: ExperimentConfig, folder: Path) -> dict[str, Any]:
    """Of the shrunk recipe on eight simulated devices; each figure is one device's."""
    config = dataclasses.replace(shrunk(config, folder), precision="float32")
    mesh = mesh_of(*MESH)
    task = ContrastiveTask(config, mesh)
    optimizer = make_optimizer(config, task.trainable, mesh=mesh)
    ema = config.optimizer.ema_decay
    abstract = abstract_state(task, optimizer, mesh, ema=ema is not None)
    step = make_train_step(
        task, optimizer, make_schedule(config), abstract, mesh, seed=0, ema_decay=ema
    )
    compiled = step.lower(abstract, task.batch_spec()).compile()
    program = Program(compiled.as_text())
    sent: collections.Counter[str] = collections.Counter()
    runs: collections.Counter[str] = collections.Counter()
    for collective in program.collectives:
        runs[collective.kind] += collective.times
        sent[collective.kind] += collective.sent_bytes
    analytic = config.global_batch_size * task.flops()
    return {
        "flops": program.flops,
        # Of all devices; the loss, the optimizer and what is done on each of them are in it.
        "flops_over_analytic": round(mesh.size * program.flops / analytic, 3),
        "state_bytes": sum(map(_shard_bytes, jax.tree.leaves(abstract))),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "collectives": dict(sorted(runs.items())),
        "sent_bytes": dict(sorted(sent.items())),
    }


def _shard_bytes(leaf: Any) -> int:
    return leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
