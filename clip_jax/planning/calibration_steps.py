"""Train steps that run on the devices of this process, to be timed."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.config import (
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    ImageTowerConfig,
    ModelConfig,
    PackingConfig,
    SourceConfig,
    TextTowerConfig,
)
from clip_jax.models import Execution
from clip_jax.parallel import make_mesh, to_global_batch
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.schedule import make_schedule
from clip_jax.training.state import abstract_state
from clip_jax.training.step import make_train_step


class RunningStep:
    """The step that `clip-jax train` would run, compiled for devices that are there."""

    def __init__(self, config: ExperimentConfig, devices: Sequence[Any]) -> None:
        self._mesh = make_mesh(config, devices)
        execution = Execution.for_backend(
            devices[0].platform,
            precision=config.precision,
            remat=config.remat,
            layers=config.layers,
            device=devices[0],
        )
        self._task = ContrastiveTask(config, self._mesh, execution=execution)
        ema = config.optimizer.ema_decay
        optimizer = make_optimizer(config, self._task.trainable, mesh=self._mesh)
        abstract = abstract_state(self._task, optimizer, self._mesh, ema=ema is not None)
        step = make_train_step(
            self._task,
            optimizer,
            make_schedule(config),
            abstract,
            self._mesh,
            seed=config.seed,
            ema_decay=ema,
        )
        lowered = step.lower(abstract, self._task.batch_spec())  # type: ignore[attr-defined]
        self._compiled = lowered.compile()
        start = jax.jit(
            lambda: jax.tree.map(_filled, abstract),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
        )
        self._start = start.lower().compile()
        self._state: Any = None
        self._batch: Any = None

    @property
    def text(self) -> str:
        """Of the program of one device."""
        return str(self._compiled.as_text())

    def start(self) -> None:
        """Makes the state and a batch. Their values are arbitrary: the speed is the same."""
        self._state = self._start()
        rng = np.random.default_rng(0)
        host = {
            name: rng.integers(0, 2, leaf.shape).astype(leaf.dtype)
            for name, leaf in self._task.batch_spec().items()
        }
        self._batch = to_global_batch(host, self._mesh)
        jax.block_until_ready((self._state, self._batch))

    def run(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        self._state, metrics = self._compiled(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - started


def _filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    # Of zeros the embeddings would have no length; small numbers take the same time as any.
    value = 0.01 if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
    return jnp.full(leaf.shape, value, leaf.dtype)


def vit_config(
    *,
    width: int,
    depth: int,
    batch: int,
    image_size: int = 224,
    vocab_size: int = 49408,
    mesh: tuple[int, int, int] = (-1, 1, 1),
    precision: str = "float32",
) -> ExperimentConfig:
    """Two towers of this width and depth, patches of 16, texts of 77 tokens to a row, no data."""
    heads = max(width // 64, 1)
    model = ModelConfig(
        image=ImageTowerConfig(
            image_size=image_size, patch_size=16, width=width, depth=depth, num_heads=heads
        ),
        text=TextTowerConfig(
            vocab_size=vocab_size,
            eot_id=vocab_size - 1,
            width=width,
            depth=depth,
            num_heads=heads,
        ),
        embed_dim=width,
    )
    return ExperimentConfig(
        name=f"width {width}, depth {depth}, batch {batch}",
        model=model,
        global_batch_size=batch,
        mesh=mesh,
        precision=precision,  # type: ignore[arg-type]
        data=DataConfig(
            sources={"none": SourceConfig(path="none")}, packing=PackingConfig(group_size=0)
        ),
        evaluation=EvaluationConfig(batch_size=batch),
    )
