"""A short run on a mesh; as a script, one of two real processes with four devices each.

python mesh_run.py RANK PORT OUTPUT.json
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
from small import small_batch, small_config, small_model

from clip_jax.config import OptimizerConfig, ScheduleConfig
from clip_jax.parallel import make_mesh, start_processes, to_global_batch
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer, make_schedule
from clip_jax.training.state import abstract_state, init_state
from clip_jax.training.step import make_train_step

NUM_STEPS, BATCH_SIZE = 20, 32
MESHES_OF_PROCESSES = ((2, 2, 2), (1, 8, 1))


def run_config(mesh):
    """Eight heads, so that a tensor axis of eight splits them."""
    model = small_model()
    heads = {"num_heads": 8, "width": 64}
    model = dataclasses.replace(
        model,
        image=dataclasses.replace(model.image, **heads),
        text=dataclasses.replace(model.text, **heads),
    )
    return small_config(
        model=model,
        mesh=mesh,
        num_steps=NUM_STEPS,
        global_batch_size=BATCH_SIZE,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(warmup_steps=2),
    )


def losses_on(shape):
    """Losses of every step, and how often the step was compiled."""
    config = run_config(shape)
    num_devices = shape[0] * shape[1] * shape[2]
    mesh = make_mesh(config, jax.devices()[:num_devices])
    task, optimizer = ContrastiveTask(config, mesh), make_optimizer(config)
    abstract = abstract_state(task, optimizer, mesh)
    state = init_state(task, optimizer, abstract, seed=0)
    step = make_train_step(task, optimizer, make_schedule(config), abstract, mesh, seed=0)
    share = BATCH_SIZE // jax.process_count()
    here = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    losses = []
    for i in range(NUM_STEPS):  # four batches, so that the loss falls
        batch = {name: x[here] for name, x in small_batch(config, seed=i % 4).items()}
        state, metrics = step(state, to_global_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
    return losses, step._cache_size()


def main() -> None:
    rank, port, output = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    jax.config.update("jax_num_cpu_devices", 4)
    start_processes(f"localhost:{port}", 2, rank)
    found = {str(mesh): losses_on(mesh) for mesh in MESHES_OF_PROCESSES}
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
