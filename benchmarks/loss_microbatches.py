"""Microbatching with the exact global loss: compiled peak memory, and real steps.

    python benchmarks/loss_microbatches.py                  # compile alone
    python benchmarks/loss_microbatches.py --steps 3        # and run, with towers of --width

Compiles the whole train step (towers, loss, AdamW) of ViT-B/32 at batch 8,192 on one device, with
1 and 16 microbatches and with and without remat inside the blocks.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import jax
import numpy as np
from environment import environment
from jax.sharding import AxisType

from clip_jax.config import ExperimentConfig, preset
from clip_jax.parallel import MESH_AXES
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer, make_schedule
from clip_jax.training.state import abstract_state, init_state
from clip_jax.training.step import make_train_step

RESULTS = Path(__file__).parent / "results" / "loss_microbatches.json"


def train_step(config: ExperimentConfig) -> tuple[Any, Any, Any]:
    """(jitted step, abstract state, function that makes the state) on one device."""
    mesh = jax.make_mesh(
        (1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )
    task, optimizer = ContrastiveTask(config, mesh), make_optimizer(config)
    abstract = abstract_state(task, optimizer, mesh)
    step = make_train_step(task, optimizer, make_schedule(config), abstract, mesh, seed=0)
    return step, (task, abstract), lambda: init_state(task, optimizer, abstract, seed=0)


def compiled_peak(config: ExperimentConfig) -> dict[str, Any]:
    step, (task, abstract), _ = train_step(config)
    start = time.perf_counter()
    memory = step.lower(abstract, task.batch_spec()).compile().memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    row = {
        "batch": config.global_batch_size,
        "microbatches": config.microbatches,
        "remat": config.remat,
        "precision": config.precision,
        "temporary_bytes": memory.temp_size_in_bytes,
        "state_and_batch_bytes": held,
        "peak_bytes": memory.temp_size_in_bytes + held,
        "compile_seconds": round(time.perf_counter() - start, 1),
    }
    print(
        f"batch {row['batch']}, {row['microbatches']:>2} microbatches, remat {row['remat']}, "
        f"{row['precision']}: temporaries {row['temporary_bytes'] / 1e9:.2f} GB, state and batch "
        f"{held / 1e9:.2f} GB, peak {row['peak_bytes'] / 1e9:.2f} GB",
        flush=True,
    )
    return row


def narrow(config: ExperimentConfig, width: int, depth: int) -> ExperimentConfig:
    """The same image and text sizes with towers `width` wide and `depth` deep."""
    towers = {
        name: dataclasses.replace(
            getattr(config.model, name), width=width, num_heads=width // 64, depth=depth
        )
        for name in ("image", "text")
    }
    model = dataclasses.replace(config.model, name="narrow", embed_dim=width, **towers)
    return dataclasses.replace(config, model=model, precision="float32")


def real_steps(config: ExperimentConfig, num_steps: int) -> dict[str, Any]:
    step, _, make_state = train_step(config)
    state = make_state()
    generator = np.random.default_rng(0)
    text, size = config.model.text, config.model.image.image_size
    batch_size = config.global_batch_size
    tokens = generator.integers(1, text.eot_id, (batch_size, text.context_length), dtype=np.int32)
    tokens[:, -1] = text.eot_id
    batch = {
        "image": generator.integers(0, 256, (batch_size, size, size, 3), dtype=np.uint8),
        "tokens": tokens,
    }
    batch = jax.device_put(batch)
    losses, seconds = [], []
    for _ in range(num_steps):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(round(time.perf_counter() - start, 1))
        print(f"loss {losses[-1]:.4f}, {seconds[-1]} s", flush=True)
    assert np.isfinite(losses).all()
    image = config.model.image
    return {"width": image.width, "depth": image.depth, "losses": losses, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=12)
    arguments = parser.parse_args()
    config = ExperimentConfig(
        model=preset(arguments.model),
        global_batch_size=arguments.batch,
        microbatches=arguments.microbatches,
        remat="full",
    )
    rows = [
        compiled_peak(dataclasses.replace(config, **changes))
        for changes in (
            {},
            {"precision": "float32"},
            {"remat": "none"},
            {"microbatches": 1},
        )
    ]
    result = {"environment": environment(), "model": arguments.model, "rows": rows}
    if arguments.steps:
        result["real"] = real_steps(
            narrow(config, arguments.width, arguments.depth), arguments.steps
        )
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
