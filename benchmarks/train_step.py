"""Samples a second of a whole training step: ours and open_clip's, on one machine in one run.

    python benchmarks/train_step.py                    # CPU: ViT-B/32 and a B/16 of fewer layers
    python benchmarks/train_step.py --models ViT-B-32 ViT-B-16 ViT-L-14 --steps 50   # a GPU
    python benchmarks/train_step.py --try              # every path at toy sizes, in two minutes

A step is both towers, the exact loss over the batch, gradients and AdamW; the batch lies on the
device beforehand, the same for all: images, and captions whose lengths are drawn as those of
DataComp-1B (caption_lengths.py). Each contender takes turns with open_clip's eager step, --repeats
times --steps each, in processes of their own, and the median turn counts. Ours runs with a caption
to a row, as open_clip does, and with packed text, which computes the same embeddings; open_clip
runs eagerly and, where it works, under torch.compile. On a CPU `clip-jax train` has the allocator
keep what a step frees, which open_clip does not; "tuned" is its eager step with that. FLOPs are
analytic, those of padded text for all, so that MFU compares times alone; the ceiling is a chain of
large matrix products in the same run. Writes benchmarks/results/train_step_<device>.json.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1] / "tests"))  # peers.py

import jax
import numpy as np
from caption_lengths import WEB_WORDS, web_lengths
from environment import environment

from clip_jax.config import (
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    ModelConfig,
    OptimizerConfig,
    PackingConfig,
    ScheduleConfig,
    SourceConfig,
    preset,
)
from clip_jax.data.packing import choose_rows, pack_captions
from clip_jax.data.text_inputs import text_ids
from clip_jax.models import forward_flops
from clip_jax.parallel import make_mesh, to_global_batch
from clip_jax.parallel.chips import chip_of
from clip_jax.parallel.host_memory import keep_freed_memory, use_one_arena
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer, make_schedule
from clip_jax.training.state import abstract_state, init_state
from clip_jax.training.step import make_train_step
from clip_jax.training.throughput import measure_peak

RESULTS = Path(__file__).parent / "results"
GROUP_SIZE = 64
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY = 1e-4, (0.9, 0.98), 1e-6, 0.2
# Images in a batch of one device, where no --batch is given.
GPU_BATCH = {"ViT-B-32": 2048, "ViT-B-16": 512, "ViT-L-14": 192}
CPU_BATCH = {"ViT-B-32": 16, "ViT-B-16": 8}

PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
ANSWER = "@ "  # begins a child's line that is for its parent

Contender = Callable[[], Any]  # one step, sent off
Wait = Callable[[Any], None]


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    model: ModelConfig
    batch: int
    precision: str
    layers: tuple[int, int] | None  # of the image and text tower, where not the preset's

    def arguments(self) -> list[Any]:
        """Of `make_case`."""
        return [self.name, self.batch, self.precision, self.layers]


# ---- The batch -------------------------------------------------------------------------------


def make_captions(model: ModelConfig, num: int) -> list[np.ndarray]:
    """Token rows without padding: start, random words, end of text."""
    rng = np.random.default_rng(0)
    text = model.text
    lengths = np.minimum(web_lengths(WEB_WORDS["DataComp-1B"])(num, 0), text.context_length)
    words = (rng.integers(1, text.eot_id - 1, length - 2) for length in lengths)
    return [np.array([text.eot_id - 1, *row, text.eot_id], np.int32) for row in words]


def padded(captions: list[np.ndarray], length: int) -> np.ndarray:
    tokens = np.zeros((len(captions), length), np.int32)
    for row, caption in zip(tokens, captions, strict=True):
        row[: len(caption)] = caption
    return tokens


# ---- Ours ------------------------------------------------------------------------------------


def ours(case: Case, *, packed: bool) -> tuple[Contender, Wait, dict[str, Any]]:
    """The step that `clip-jax train` runs, on a batch that lies on the device."""
    length = case.model.text.context_length
    captions = make_captions(case.model, case.batch)
    rng = np.random.default_rng(1)
    size = case.model.image.image_size
    batch = {"image": rng.integers(0, 256, (case.batch, size, size, 3), np.uint8)}
    packing = PackingConfig()
    if packed:
        group = min(GROUP_SIZE, case.batch)
        measured = np.array([len(caption) for caption in make_captions(case.model, 2**14)])
        rows = choose_rows(measured, group, length)
        packing = PackingConfig(group_size=group, rows=rows)
        text = pack_captions(captions, group_size=group, rows=rows, row_length=length, pad_id=0)
        assert text.num_cut == 0, "a caption was cut: the texts would not be the same"
        batch |= {"tokens": text.tokens, "segments": text.segments, "eot": text.eot}
        batch["text_id"] = text_ids(captions)
    else:
        batch["tokens"] = padded(captions, length)
    config = ExperimentConfig(
        model=case.model,
        global_batch_size=case.batch,
        precision=case.precision,
        num_steps=10**6,
        data=DataConfig(sources={"none": SourceConfig(path="none")}, packing=packing),
        optimizer=OptimizerConfig(
            learning_rate=LEARNING_RATE,
            b1=BETAS[0],
            b2=BETAS[1],
            epsilon=EPSILON,
            weight_decay=WEIGHT_DECAY,
            clip_global_norm=None,
        ),
        schedule=ScheduleConfig(name="constant", warmup_steps=0),
        evaluation=EvaluationConfig(batch_size=case.batch),
    )
    mesh = make_mesh(config)
    task = ContrastiveTask(config, mesh)
    optimizer = make_optimizer(config, task.trainable)
    abstract = abstract_state(task, optimizer, mesh)
    state = init_state(task, optimizer, abstract, seed=0)
    step = make_train_step(task, optimizer, make_schedule(config), abstract, mesh, seed=0)
    on_device = to_global_batch(batch, mesh)
    compiled = step.lower(state, on_device).compile()
    memory = compiled.memory_analysis()

    def run() -> Any:
        nonlocal state
        state, metrics = compiled(state, on_device)
        return metrics["loss"]

    figures = {"temporary_bytes": memory.temp_size_in_bytes}
    if packed:
        figures["rows_over_captions"] = packing.rows / packing.group_size
    return run, lambda loss: loss.block_until_ready(), figures


# ---- open_clip -------------------------------------------------------------------------------


def theirs(case: Case, *, compiled: bool) -> tuple[Contender, Wait, dict[str, Any]]:
    """open_clip's model, loss and optimizer groups, as its own training loop runs them."""
    import torch
    from peers import open_clip_or_skip

    threads = torch.get_num_threads()
    open_clip = open_clip_or_skip()
    torch.set_num_threads(max(threads, _cores()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = open_clip.get_model_config(case.name)
    if case.layers is not None:
        settings["vision_cfg"]["layers"], settings["text_cfg"]["layers"] = case.layers
    model = open_clip.model.CLIP(**settings).to(device)
    rows = make_captions(case.model, case.batch)
    tokens = torch.from_numpy(padded(rows, case.model.text.context_length)).long().to(device)
    size = case.model.image.image_size
    pixels = np.random.default_rng(1).integers(0, 256, (case.batch, size, size, 3), np.uint8)
    mean, std = (np.array(x, np.float32) for x in (case.model.image.mean, case.model.image.std))
    normal = (pixels.astype(np.float32) / 255 - mean) / std
    image = torch.from_numpy(normal.transpose(0, 3, 1, 2).copy()).to(device)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.0}, {"params": decayed}],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=WEIGHT_DECAY,
    )
    loss_of = open_clip.ClipLoss()
    forward = torch.compile(model) if compiled else model
    low = case.precision == "bfloat16"

    def run() -> Any:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            image_features, text_features, scale = forward(image, tokens)
            loss = loss_of(image_features, text_features, scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        return loss

    def wait(loss: Any) -> None:
        loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run, wait, {"device": device.type, "threads": torch.get_num_threads()}


def _cores() -> int:
    return len(os.sched_getaffinity(0))


# ---- Taking turns ----------------------------------------------------------------------------

PEER = "open_clip, eager"
TUNED = "open_clip, eager, tuned"  # with our setting of the allocator, which its users lack
CONTENDERS: dict[str, Callable[[Case], tuple[Contender, Wait, dict[str, Any]]]] = {
    "ours, padded": lambda case: ours(case, packed=False),
    "ours, packed": lambda case: ours(case, packed=True),
    PEER: lambda case: theirs(case, compiled=False),
    TUNED: lambda case: theirs(case, compiled=False),
    "open_clip, compiled": lambda case: theirs(case, compiled=True),
}


class Child:
    """A contender in a process of its own: memory, threads and allocator are its own too."""

    def __init__(self, name: str, case: Case) -> None:
        command = [
            sys.executable,
            __file__,
            "--child",
            name,
            "--case",
            json.dumps(case.arguments()),
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.figures = self._answer()

    def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> dict[str, Any]:
        figures = self.ask("end")
        self._process.wait()
        return figures

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise RuntimeError(f"{self._process.args} ended with exit code {self._process.wait()}")


def answer(figures: dict[str, Any]) -> None:
    print(ANSWER + json.dumps(figures), flush=True)


def serve(name: str, case: Case) -> None:
    """What a child does: four steps, then `turn STEPS` as often as asked for, then `end`."""
    start = time.perf_counter()
    try:
        run, wait, figures = CONTENDERS[name](case)
        first = run()
        wait(first)
        keep_freed_memory()
        for _ in range(3):  # until the allocator has found its size
            wait(run())
    except Exception as error:  # a peer that does not run here: its reason is the result
        if name.startswith("ours"):
            raise
        answer({"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
        return
    seconds = round(time.perf_counter() - start, 1)
    answer({**figures, "first_loss": first.item(), "start_seconds": seconds})
    for line in sys.stdin:
        what, *rest = line.split()
        if what == "end":
            break
        start = time.perf_counter()
        for _ in range(int(rest[0])):
            result = run()
        wait(result)
        answer({"seconds": (time.perf_counter() - start) / int(rest[0])})
    figures = {"peak_host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if name.startswith("ours"):
        device = jax.local_devices()[0]
        figures["device_memory"] = device.memory_stats()
        figures["ceiling_tflops"] = measure_peak(case.precision)
        chip = chip_of(device)
        figures["peak_tflops"] = None if chip is None else chip.peak_tflops[case.precision]
    else:
        import torch

        if torch.cuda.is_available():
            figures["device_memory"] = {"peak_bytes_in_use": torch.cuda.max_memory_allocated()}
    answer(figures)


def measure(case: Case, names: list[str], steps: int, repeats: int) -> dict[str, Any]:
    """Figures of each contender; one that does not run says why."""
    rows: dict[str, Any] = {}
    if jax.default_backend() == "cpu":  # two fit into memory: each takes turns with the peer
        for name in [name for name in names if name != PEER] or names:
            children = {one: Child(one, case) for one in (name, PEER) if one in names}
            for one, child in children.items():
                seconds = rows.get(one, {}).get("seconds", [])
                rows[one] = {**child.figures, "seconds": seconds}
            running = {one: child for one, child in children.items() if "failed" not in rows[one]}
            turns: dict[str, list[float]] = {one: [] for one in running}
            for _ in range(repeats):
                for one, child in running.items():
                    turns[one].append(child.ask(f"turn {steps}")["seconds"])
            for one, child in running.items():
                rows[one]["seconds"] += turns[one]
                rows[one] |= child.end()
            if turns.keys() == {name, PEER}:
                both = {one: statistics.median(seconds) for one, seconds in turns.items()}
                rows[name]["ratio_to_eager"] = both[PEER] / both[name]
    else:  # each may need all of the device: one after the other, and the first ones once more
        for name in [*names, *names[:1]]:
            child = Child(name, case)
            row = rows.setdefault(name, {"seconds": []}) | child.figures
            rows[name] = row
            if "failed" not in row:
                row["seconds"] += [child.ask(f"turn {steps}")["seconds"] for _ in range(repeats)]
                row |= child.end()
    flops = 3 * sum(forward_flops(case.model))
    ceiling = 1e12 * max(row.get("ceiling_tflops", 0.0) for row in rows.values())
    peak = next((row["peak_tflops"] for row in rows.values() if row.get("peak_tflops")), None)
    for row in rows.values():
        if "failed" in row:
            continue
        row["samples_per_second"] = case.batch / statistics.median(row["seconds"])
        if ceiling:
            row["of_ceiling"] = row["samples_per_second"] * flops / ceiling
        if peak is not None:
            row["mfu"] = row["samples_per_second"] * flops / (peak * 1e12)
    peer = rows.get(PEER, {}).get("samples_per_second")
    for row in rows.values():
        if peer and "samples_per_second" in row:
            row.setdefault("ratio_to_eager", row["samples_per_second"] / peer)
    return {
        "batch": case.batch,
        "precision": case.precision,
        "layers": case.layers,
        "gflops_per_sample": flops / 1e9,
        "ceiling_tflops": ceiling / 1e12,
        "contenders": rows,
    }


def make_case(name: str, batch: int | None, precision: str, layers: tuple[int, int] | None) -> Case:
    model = preset(name)
    if layers is not None:
        image = dataclasses.replace(model.image, depth=layers[0])
        model = dataclasses.replace(
            model, image=image, text=dataclasses.replace(model.text, depth=layers[1])
        )
    sizes = CPU_BATCH if jax.default_backend() == "cpu" else GPU_BATCH
    return Case(name, model, batch or sizes[name], precision, layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(GPU_BATCH))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS))
    parser.add_argument("--batch", type=int, help="for all models")
    parser.add_argument("--precision", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, help="of a turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--try", dest="toy", action="store_true", help="two layers, small batches")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        if arguments.child.startswith("ours") or arguments.child == TUNED:
            use_one_arena()  # as `clip-jax train` does, before JAX starts its threads
        serve(arguments.child, make_case(*arguments.case))
        return
    os.environ[PREALLOCATE] = "false"  # this process asks for the names of devices alone
    on_cpu = jax.default_backend() == "cpu"
    models = arguments.models or (list(CPU_BATCH) if on_cpu else list(GPU_BATCH))
    precision = arguments.precision or ("float32" if on_cpu else "bfloat16")
    steps = arguments.steps or (1 if arguments.toy else 3 if on_cpu else 50)
    names = arguments.contenders or [name for name in CONTENDERS if on_cpu or name != TUNED]
    result: dict[str, Any] = {"environment": environment(), "models": {}}
    for name in models:
        layers = (1, 1) if arguments.toy else (4, 4) if on_cpu and name != "ViT-B-32" else None
        case = make_case(name, 8 if arguments.toy else arguments.batch, precision, layers)
        result["models"][name] = found = measure(case, names, steps, arguments.repeats)
        print(
            f"{name}, batch {case.batch}, {precision}: {found['gflops_per_sample']:.1f} GFLOPs a "
            f"sample, ceiling {found['ceiling_tflops']:.2f} TFLOP/s"
        )
        for contender, row in found["contenders"].items():
            if "failed" in row:
                print(f"  {contender:24} {row['failed']}", flush=True)
                continue
            ratio = f"{row['ratio_to_eager']:6.2f}x eager" if "ratio_to_eager" in row else ""
            memory = (row.get("device_memory") or {}).get("peak_bytes_in_use")
            share = f"{row['of_ceiling']:.1%} of the ceiling  " if "of_ceiling" in row else ""
            print(
                f"  {contender:24} {row['samples_per_second']:10.2f} samples/s {ratio}  {share}"
                f"first loss {row['first_loss']:.4f}  peak "
                f"{(memory or row['peak_host_bytes']) / 1e9:.1f} GB",
                flush=True,
            )
    kind = jax.devices()[0].device_kind.replace(" ", "_").lower()
    suffix = "_try" if arguments.toy else ""
    path = RESULTS / f"train_step_{kind}{suffix}.json"
    if not arguments.toy:
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
