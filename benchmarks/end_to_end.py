"""Training from tars against the same step on data that lies on the device.

    python benchmarks/end_to_end.py                # CPU: a ViT-B/32 of two layers, 64 px
    python benchmarks/end_to_end.py --models ViT-B-32    # a GPU; a call for each model
    python benchmarks/end_to_end.py --try          # toy sizes, in a minute

`clip-jax train`'s own loop reads tars (photographs of 512 px, quality 95, made here as loader.py
makes them), decodes, crops, tokenizes and trains; then its compiled step runs alone, on the loop's
first batch, for as many steps. Runs and steps alone take turns, --repeats times each; medians
count. The first third of a run's log lines is left out: queues are full then. On a GPU the run
should reach 95% of the step alone. On a CPU the loader takes cores from the step, so the share
says how much; what matters there is the last line: how many cores feed a device of a given speed,
by the loader's own samples a second of a core (benchmarks/results/loader.json). All is of one
device: of several GPUs the first one is taken. Merged by model into
benchmarks/results/end_to_end_<device>.json.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import jax
from environment import environment, merge_into
from loader import NUM_TARS, write_tars
from loader import RESULTS as LOADER_RESULTS
from train_step import GPU_BATCH, gpu_batch

from clip_jax.checkpoint import Workdir
from clip_jax.config import (
    CheckpointConfig,
    DataConfig,
    ExperimentConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    SourceConfig,
    preset,
)
from clip_jax.parallel import make_mesh, to_global_batch
from clip_jax.parallel.chips import chip_of
from clip_jax.parallel.host_memory import use_one_arena
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.input import TrainingInput, open_sources
from clip_jax.training.loop import train
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.schedule import make_schedule
from clip_jax.training.state import abstract_state, init_state
from clip_jax.training.step import make_train_step
from clip_jax.training.vocabulary import prepare_tokenizer

RESULTS = Path(__file__).parent / "results"
NUM_PHOTOS, TOY_PHOTOS, SIDE = 2000, 200, 512
SMALL_BATCH = 32
LINES = 12  # of a run's log
GOAL = 0.95


def make_config(
    model: ModelConfig, batch: int, steps: int, folder: Path, workers: int, threads: int
) -> ExperimentConfig:
    return ExperimentConfig(
        name="end_to_end",
        model=model,
        num_steps=steps,
        global_batch_size=batch,
        precision="float32" if jax.default_backend() == "cpu" else "bfloat16",
        data=DataConfig(
            sources={"photos": SourceConfig(path=f"{folder}/{{0..3}}.tar")},
            num_workers=workers,
            num_threads=threads,
            cache_dir=str(folder / "cache"),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        schedule=ScheduleConfig(warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=10**6),
        logging=LoggingConfig(every_steps=max(steps // LINES, 1), tensorboard=False),
    )


def from_tars(config: ExperimentConfig, workdir: Workdir) -> dict[str, float]:
    """Median figures of a run's log lines once it is under way."""
    train(config, workdir)
    lines = [json.loads(line) for line in workdir.metrics.read_text().splitlines()]
    lines = lines[len(lines) // 3 :]
    names = ("steps_per_second", "samples_per_second", "data_wait", "data/decode_ms")
    return {name: statistics.median(line[name] for line in lines) for name in names}


def resident(config: ExperimentConfig, workdir: Workdir) -> Any:
    """The step of the run in `workdir` on its first batch: seconds of so many steps."""
    mesh = make_mesh(config)
    assert mesh.size == 1
    sources = open_sources(config, Path(str(config.data.cache_dir)))
    tokenizer = prepare_tokenizer(config, sources, workdir)
    with contextlib.closing(
        TrainingInput(config, sources, tokenizer, first_sample=0, saved={}, workdir=workdir)
    ) as batches:
        batch = to_global_batch(next(batches), mesh)
    task = ContrastiveTask(config, mesh)
    optimizer = make_optimizer(config, task.trainable, mesh=mesh)
    abstract = abstract_state(task, optimizer, mesh)
    state = init_state(task, optimizer, abstract, seed=0)
    step = make_train_step(task, optimizer, make_schedule(config), abstract, mesh, seed=0)
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)

    def seconds(count: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(count):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start

    return seconds


def measure(config: ExperimentConfig, repeats: int, scratch: Path) -> dict[str, Any]:
    runs, alone = [], []
    packing = None
    for repeat in range(repeats):
        workdir = Workdir(scratch / f"run{repeat}")
        runs.append(from_tars(config, workdir))
        saved = workdir.load_config()  # with the packing that the run chose
        packing = saved.data.packing
        count = max(config.num_steps // 2, 1)
        alone.append(count * config.global_batch_size / resident(saved, workdir)(count))
    found = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    step_alone = statistics.median(alone)
    assert packing is not None
    return {
        "batch": config.global_batch_size,
        "precision": config.precision,
        "image_size": config.model.image.image_size,
        "layers": [config.model.image.depth, config.model.text.depth],
        "workers": config.data.num_workers,
        "threads": config.data.num_threads,
        "packing": dataclasses.asdict(packing),
        **found,
        "step_alone_samples_per_second": step_alone,
        "share": found["samples_per_second"] / step_alone,
        "runs": [run["samples_per_second"] for run in runs],
        "steps_alone": alone,
    }


def samples_per_core() -> float | None:
    """Of the loader with fast decoding from 512 to 224 px: samples a second of CPU time."""
    if not LOADER_RESULTS.exists():
        return None
    speed = json.loads(LOADER_RESULTS.read_text())["speed"]
    return 1000 / float(speed["ours, 1 thread"]["cpu_ms_per_sample"])


def num_photos(least: int, batches: Iterable[int]) -> int:
    """In tars of equal size: two of the largest batch, as a run must have one at least."""
    return -(-max(least, 2 * max(batches)) // NUM_TARS) * NUM_TARS


def make_model(name: str, *, on_cpu: bool) -> ModelConfig:
    model = preset(name)
    if not on_cpu:
        return model
    return dataclasses.replace(
        model,
        image=dataclasses.replace(model.image, depth=2, image_size=64),
        text=dataclasses.replace(model.text, depth=2),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(GPU_BATCH), default=["ViT-B-32"])
    parser.add_argument("--batch", type=int, help="for all models")
    parser.add_argument("--steps", type=int, help="of a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, help="processes of the loader")
    parser.add_argument("--threads", type=int, default=2, help="of each")
    parser.add_argument("--output", type=Path, help="JSON, merged with what is there")
    parser.add_argument("--try", dest="toy", action="store_true", help="one run of a few steps")
    arguments = parser.parse_args()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.partition(",")[0]
    use_one_arena()  # as `clip-jax train` does
    on_cpu = jax.default_backend() == "cpu"
    if jax.device_count() > 1:
        raise SystemExit(
            f"JAX has {jax.device_count()} devices; leave it one, by TPU_VISIBLE_CHIPS=0 say"
        )
    cores = len(os.sched_getaffinity(0))
    workers = arguments.workers
    if workers is None:
        workers = 0 if cores <= 4 else cores // 2 - 1  # two threads each; one pair for the loop
    steps = arguments.steps or (6 if arguments.toy else 60 if on_cpu else 100)
    repeats = 1 if arguments.toy else arguments.repeats
    chip, small = chip_of(jax.devices()[0]), on_cpu or arguments.toy
    memory = None if chip is None else chip.memory_bytes
    batches = {
        name: arguments.batch or (SMALL_BATCH if small else gpu_batch(name, memory))
        for name in arguments.models
    }
    output = arguments.output
    if output is None and not arguments.toy:
        kind = jax.devices()[0].device_kind.replace(" ", "_").lower()
        output = RESULTS / f"end_to_end_{kind}.json"
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
        photos = num_photos(TOY_PHOTOS if arguments.toy else NUM_PHOTOS, batches.values())
        write_tars(Path(folder), photos, SIDE)
        for name, batch in batches.items():
            model = make_model(name, on_cpu=small)
            config = make_config(model, batch, steps, Path(folder), workers, arguments.threads)
            found = measure(config, repeats, Path(folder) / name)
            print(
                f"{name}, batch {batch}, {config.precision}: {found['samples_per_second']:,.0f} "
                f"samples/s from tars, {found['step_alone_samples_per_second']:,.0f} alone: "
                f"{found['share']:.1%} (goal on a GPU: {GOAL:.0%}), data wait "
                f"{found['data_wait']:.1%}"
            )
            per_core = samples_per_core()
            if per_core is not None:
                found["cores_that_feed_it"] = found["step_alone_samples_per_second"] / per_core
                print(
                    f"  {found['cores_that_feed_it']:.2f} cores feed it, at {per_core:,.0f} "
                    "samples/s of a core"
                )
            if output is not None:
                merge_into(output, "models", name, {"environment": environment(), **found})


if __name__ == "__main__":
    main()
