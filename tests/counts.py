"""What the compiled train step of a recipe costs, in counts: FLOPs, bytes, collectives."""

import collections
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from recipes import shrunk
from small import mesh_of

from clip_jax.config import ExperimentConfig, PackingConfig
from clip_jax.config.packing import choose_group_size
from clip_jax.parallel import batch_sharding
from clip_jax.planning import Program
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.schedule import make_schedule
from clip_jax.training.state import abstract_state, init_state
from clip_jax.training.step import make_train_step

MESH = (2, 2, 2)
# Eight captions to four rows: what `planning.assumed` takes for a group of eight, the largest that
# a device has of this batch, and what the quickstart measures (docs/performance.md).
PACKED_BATCH = 32
_ROWS = 0.5


def small_step_config(config: ExperimentConfig, folder: Path) -> ExperimentConfig:
    """The recipe, shrunk, in float32, as CPUs compute: two blocks in a scan, and the last."""
    config = dataclasses.replace(shrunk(config, folder), precision="float32")
    image, text = (dataclasses.replace(x, depth=3) for x in (config.model.image, config.model.text))
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, image=image, text=text)
    )


def packed(config: ExperimentConfig) -> ExperimentConfig:
    """With captions packed, as a run chooses by itself where a device has eight samples or more."""
    config = dataclasses.replace(config, global_batch_size=PACKED_BATCH)
    group = choose_group_size(config, MESH[0] * MESH[1])
    packing = PackingConfig(group_size=group, rows=round(_ROWS * group))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, packing=packing))


class Step:
    """The train step of a config on eight simulated devices; each figure is one device's."""

    def __init__(self, config: ExperimentConfig) -> None:
        mesh = mesh_of(*MESH)
        self.task = ContrastiveTask(config, mesh)
        self._optimizer = make_optimizer(config, self.task.trainable, mesh=mesh)
        ema = config.optimizer.ema_decay
        self._abstract = abstract_state(self.task, self._optimizer, mesh, ema=ema is not None)
        self._step = make_train_step(
            self.task,
            self._optimizer,
            make_schedule(config),
            self._abstract,
            mesh,
            seed=0,
            ema_decay=ema,
        )
        self._compiled = self._step.lower(self._abstract, self.task.batch_spec()).compile()
        self._program = Program(self._compiled.as_text())
        self.flops = self._program.flops
        self.analytic_flops = config.global_batch_size * self.task.flops(least=True) / mesh.size

    @property
    def flops_over_analytic(self) -> float:
        """The loss, the optimizer and what several devices do alike are in it."""
        return self.flops / self.analytic_flops

    def counts(self) -> dict[str, Any]:
        sent: collections.Counter[str] = collections.Counter()
        runs: collections.Counter[str] = collections.Counter()
        for collective in self._program.collectives:
            runs[collective.kind] += collective.times
            sent[collective.kind] += collective.sent_bytes
        return {
            "flops": self.flops,
            "flops_over_analytic": round(self.flops_over_analytic, 3),
            "state_bytes": sum(map(_shard_bytes, jax.tree.leaves(self._abstract))),
            "temporary_bytes": self._compiled.memory_analysis().temp_size_in_bytes,
            "collectives": dict(sorted(runs.items())),
            "sent_bytes": dict(sorted(sent.items())),
        }

    def compilations_of_two_steps(self) -> int:
        """Of batches of zeros, as a run puts them on its devices."""
        sharding = batch_sharding(self.task.mesh)
        state = init_state(self.task, self._optimizer, self._abstract, seed=0)
        for _ in range(2):
            batch = {
                name: jax.device_put(jnp.zeros(spec.shape, spec.dtype), sharding)
                for name, spec in self.task.batch_spec().items()
            }
            state, _ = self._step(state, batch)
        return self._step._cache_size()


def _shard_bytes(leaf: Any) -> int:
    return leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
