"""Samples a second of a whole training step: ours and open_clip's, on one machine in one run.

    python benchmarks/train_step.py                      # CPU: ViT-B/32 and a B/16 of fewer layers
    python benchmarks/train_step.py --models ViT-B-32    # a GPU; a call for each model
    python benchmarks/train_step.py --models ViT-B-16
    python benchmarks/train_step.py --models ViT-L-14
    python benchmarks/train_step.py --try                # every path at toy sizes, in minutes

A step is both towers, the exact loss over the batch, gradients and AdamW, on one device; the batch
lies there beforehand, the same for all: images, and captions whose lengths are drawn as those of
DataComp-1B (caption_lengths.py). Contenders are processes of their own and take --repeats turns of
--steps each; the median turn counts. On a CPU each takes turns with open_clip's eager step, and its
ratio is the median of those of the pairs of turns. An accelerator's memory holds one contender at a
time: the eager step runs first and last, and every turn of another is divided into every one of its
turns; where its two medians differ by over 3%, the run says so. Least and most of the ratios are
given with the median. The ratio to open_clip's compiled step is the quotient of the two to eager.

Ours runs with a caption to a row, as open_clip does, and with packed text, which computes the same
embeddings; open_clip runs eagerly and, where it works, under torch.compile. On a CPU `clip-jax
train` has the allocator keep what a step frees, which open_clip does not; "tuned" is its eager step
with that. FLOPs are analytic: MFU and the share of the ceiling, a chain of large matrix products in
the same run, count those that a contender computes: fewer where text is packed, and of ours in the
last blocks, which are not computed for tokens that nothing is made of;
`of_ceiling_padded` in the JSON compares times alone.

open_clip takes the extra `verify`; on a GPU ours takes `cuda`, and torch must be a build for CUDA.
Where there is no network, carry the wheels of clip-jax's dependencies, open_clip_torch, timm and
torchvision. A contender that does not run is a row that says why; the exit code is 1 then.

A model is given --seconds, 480 on accelerators: no turn, and no contender, is begun after them. By
default, 20 steps and 3 turns, its steps take 70 to 125 s on an H200 at the rates hoped for, six
starts a minute and a half, the compilations perhaps four minutes: computed, not timed.
Results are merged by model, after each contender, into benchmarks/results/train_step_<device>.json.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1] / "tests"))  # peers.py

import jax
import numpy as np
from caption_lengths import WEB_WORDS, web_lengths
from environment import environment, merge_into

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
from clip_jax.config.packing import choose_group_size
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
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY = 1e-4, (0.9, 0.98), 1e-6, 0.2
# Images in a batch of one device, where no --batch is given. GPU_BATCH is an H200's, on which B/32
# takes 62 GB of temporaries (train_step_aot.py).
GPU_BATCH = {"ViT-B-32": 2048, "ViT-B-16": 512, "ViT-L-14": 192}
GPU_MEMORY = 141e9
CPU_BATCH = {"ViT-B-32": 16, "ViT-B-16": 8}
GPU_SECONDS = 480  # of a call of ten minutes
DRIFT = 0.03  # of the eager step between its first and last turns, beyond which a run says so

ANSWER = "@ "  # begins a child's line that is for its parent
MACHINE = "machine"  # the child that says what there is

Contender = Callable[[], Any]  # one step, sent off
Wait = Callable[[Any], None]
Row = dict[str, Any]  # figures of a contender, or why it "failed"


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    model: ModelConfig
    batch: int
    precision: str
    layers: tuple[int, int] | None  # of the image and text tower, where not the preset's
    platform: str  # of JAX's devices

    def arguments(self) -> list[Any]:
        """Of `make_case`."""
        return [self.name, self.batch, self.precision, self.layers, self.platform]


def make_case(
    name: str, batch: int, precision: str, layers: tuple[int, int] | None, platform: str
) -> Case:
    model = preset(name)
    if layers is not None:
        image = dataclasses.replace(model.image, depth=layers[0])
        model = dataclasses.replace(
            model, image=image, text=dataclasses.replace(model.text, depth=layers[1])
        )
    return Case(name, model, batch, precision, layers, platform)


def gpu_batch(name: str, memory_bytes: int | None) -> int:
    """`GPU_BATCH`, halved until it is no larger a share of a device's memory than of an H200's."""
    if memory_bytes is None:
        return GPU_BATCH[name]
    return GPU_BATCH[name] >> max(0, math.ceil(math.log2(GPU_MEMORY / memory_bytes)))


# ---- The batch -------------------------------------------------------------------------------


def draw_lengths(model: ModelConfig, num: int) -> np.ndarray:
    lengths = web_lengths(WEB_WORDS["DataComp-1B"])(num, 0)
    return np.minimum(lengths, model.text.context_length)


def make_captions(model: ModelConfig, num: int) -> list[np.ndarray]:
    """Token rows without padding: start, random words, end of text."""
    rng = np.random.default_rng(0)
    text, lengths = model.text, draw_lengths(model, num)
    words = (rng.integers(1, text.eot_id - 1, length - 2) for length in lengths)
    return [np.array([text.eot_id - 1, *row, text.eot_id], np.int32) for row in words]


def padded(captions: list[np.ndarray], length: int) -> np.ndarray:
    tokens = np.zeros((len(captions), length), np.int32)
    for row, caption in zip(tokens, captions, strict=True):
        row[: len(caption)] = caption
    return tokens


# ---- Ours ------------------------------------------------------------------------------------


def make_config(case: Case, packing: PackingConfig) -> ExperimentConfig:
    return ExperimentConfig(
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


def choose_packing(case: Case) -> PackingConfig:
    """As `clip-jax train` chooses it. Raises ValueError where no group divides the batch."""
    group = choose_group_size(make_config(case, PackingConfig()), 1)
    if not group:
        raise ValueError(f"a batch of {case.batch} is not packed: no multiple of 8 captions")
    rows = choose_rows(draw_lengths(case.model, 2**14), group, case.model.text.context_length)
    return PackingConfig(group_size=group, rows=rows)


def make_batch(case: Case, packing: PackingConfig) -> dict[str, np.ndarray]:
    """Images, and the captions as `packing` says."""
    rng, size = np.random.default_rng(1), case.model.image.image_size
    batch = {"image": rng.integers(0, 256, (case.batch, size, size, 3), np.uint8)}
    captions = make_captions(case.model, case.batch)
    length, group = case.model.text.context_length, packing.group_size
    if not group:
        return batch | {"tokens": padded(captions, length)}
    text = pack_captions(captions, group_size=group, rows=packing.rows, row_length=length, pad_id=0)
    assert text.num_cut == 0, "a caption was cut: the texts would not be the same"
    batch |= {"tokens": text.tokens, "segments": text.segments, "eot": text.eot}
    return batch | {"text_id": text_ids(captions)}


def ours(case: Case, *, packed: bool) -> tuple[Contender, Wait, Row]:
    """The step that `clip-jax train` runs on one device, on a batch that lies there."""
    packing = choose_packing(case) if packed else PackingConfig()
    config = make_config(case, packing)
    mesh = make_mesh(config, jax.local_devices()[:1])  # as many as torch takes
    task = ContrastiveTask(config, mesh)
    optimizer = make_optimizer(config, task.trainable, mesh=mesh)
    abstract = abstract_state(task, optimizer, mesh)
    state = init_state(task, optimizer, abstract, seed=0)
    step = make_train_step(task, optimizer, make_schedule(config), abstract, mesh, seed=0)
    on_device = to_global_batch(make_batch(case, packing), mesh)
    compiled = step.lower(state, on_device).compile()
    memory = compiled.memory_analysis()

    def run() -> Any:
        nonlocal state
        state, metrics = compiled(state, on_device)
        return metrics["loss"]

    figures = {
        "num_devices": mesh.size,
        "flops_per_sample": task.flops(least=True),
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    if packed:
        figures["rows_over_captions"] = packing.rows / packing.group_size
    return run, lambda loss: loss.block_until_ready(), figures


# ---- open_clip -------------------------------------------------------------------------------


def theirs(case: Case, *, compiled: bool) -> tuple[Contender, Wait, Row]:
    """open_clip's model, loss and optimizer groups, as its own training loop runs them.

    Raises ImportError where it is not installed, RuntimeError where torch does not see the GPU.
    """
    import peers

    open_clip = peers.open_clip()
    import torch

    torch.set_num_threads(max(torch.get_num_threads(), _cores()))
    device = torch.device("cpu" if case.platform == "cpu" else "cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"JAX computes on a {case.platform} here and torch {torch.__version__} sees no "
                "CUDA device; install a build of torch for CUDA that this driver takes"
            )
        # open_clip_train/main.py
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.deterministic = False
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
COMPILED = "open_clip, compiled"
TUNED = "open_clip, eager, tuned"  # with our setting of the allocator, which its users lack
CONTENDERS: dict[str, Callable[[Case], tuple[Contender, Wait, Row]]] = {
    "ours, padded": lambda case: ours(case, packed=False),
    "ours, packed": lambda case: ours(case, packed=True),
    PEER: lambda case: theirs(case, compiled=False),
    TUNED: lambda case: theirs(case, compiled=False),
    COMPILED: lambda case: theirs(case, compiled=True),
}


def environ_of(name: str, cache: str) -> dict[str, str]:
    """The environment of a child. cache: folder of what XLA has compiled."""
    if name.startswith("ours"):
        added = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    else:
        added = {"JAX_PLATFORMS": "cpu"}  # nothing of JAX may open the GPU beside torch
    return {**os.environ, **added}


class Child:
    """A contender in a process of its own: memory, threads and allocator are its own too."""

    def __init__(self, name: str, arguments: list[Any], environ: dict[str, str]) -> None:
        command = [sys.executable, __file__, "--child", name, "--case", json.dumps(arguments)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
        )
        self.seconds: list[float] = []  # of a step, by turn
        self.row = self._answer()

    def turn(self, steps: int) -> None:
        """Nothing where it has failed, or fails now: `row` says why."""
        answer = self._ask(f"turn {steps}")
        if "seconds" in answer:
            self.seconds.append(answer["seconds"])
        else:
            self.row |= answer

    def end(self) -> Row:
        """All its figures, when it has given its memory back."""
        self.row |= self._ask("end")
        with contextlib.suppress(BrokenPipeError), self._process:
            pass
        return self.row | {"seconds": self.seconds}

    def _ask(self, what: str) -> Row:
        if "failed" in self.row:
            return {}
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: `_answer` says how
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Row:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                answer = json.loads(line.removeprefix(ANSWER))
                break
        else:
            answer = {"failed": f"it ended with exit code {self._process.wait()}"}
        if "failed" in answer:
            self._process.wait()  # the next one may need its memory
        return answer


def answer(figures: Row) -> None:
    print(ANSWER + json.dumps(figures), flush=True)


def serve(name: str, work: Callable[[], None]) -> None:
    """What a child does: whatever fails, its reason is the answer."""
    try:
        work()
    except Exception as error:
        logging.exception("%s failed", name)
        answer({"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]})


def compete(name: str, case: Case) -> None:
    """Four steps, then `turn STEPS` as often as asked for, then `end`."""
    start = time.perf_counter()
    run, wait, figures = CONTENDERS[name](case)
    first = run()
    wait(first)
    keep_freed_memory()
    for _ in range(3):  # until the allocator has found its size
        wait(run())
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


def describe() -> None:
    """A child that says what there is and ends: others can have the device then."""
    chip = chip_of(jax.local_devices()[0])
    memory = None if chip is None else chip.memory_bytes // chip.num_devices
    answer({"environment": environment(), "memory_bytes": memory})
    sys.stdin.readline()  # "end"
    answer({})


def rounds_of(names: list[str], platform: str) -> list[list[str]]:
    """Contenders that take turns, one such list after the other."""
    others = [name for name in names if name != PEER]
    if PEER not in names:
        return [[name] for name in others]
    if platform == "cpu":  # two fit into memory
        return [[name, PEER] for name in others] or [[PEER]]
    return [[PEER], *([name] for name in others), [PEER]] if others else [[PEER]]


def measure(
    case: Case, names: list[str], steps: int, repeats: int, seconds: float
) -> Iterator[dict[str, Row]]:
    """The rows so far, after each round."""
    rows: dict[str, Row] = {}
    rounds, end = rounds_of(names, case.platform), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as cache:
        for number, together in enumerate(rounds):
            left = end - time.monotonic()
            if left > 0:
                until = time.monotonic() + left / (len(rounds) - number)
                found = take_turns(case, together, steps, repeats, until, cache)
            else:
                found = {name: {"failed": "not begun: --seconds were over"} for name in together}
                found = {name: row for name, row in found.items() if name not in rows}
            for name, row in found.items():
                before = rows.get(name, {"seconds": [], "medians": []})
                rows[name] = before | row
                for key in ("seconds", "medians"):
                    rows[name][key] = [*before[key], *row.get(key, [])]
            yield rows


def take_turns(
    case: Case, names: list[str], steps: int, repeats: int, until: float, cache: str
) -> dict[str, Row]:
    """One turn each at least, and none begun after `until`."""
    children = {name: Child(name, case.arguments(), environ_of(name, cache)) for name in names}
    for number in range(repeats):
        if number and time.monotonic() > until:
            break
        for child in children.values():
            child.turn(steps)
    rows = {name: child.end() for name, child in children.items()}
    for row in rows.values():
        row["medians"] = [statistics.median(row["seconds"])] if row["seconds"] else []
    if len(names) == 2:
        one, peer = names
        rows[one]["peer_seconds"] = rows[peer]["seconds"]
    return rows


# ---- Figures ---------------------------------------------------------------------------------


def summary(case: Case, rows: dict[str, Row]) -> dict[str, Any]:
    """What is known of a model, of whichever contenders have run."""
    padded_flops = 3 * sum(forward_flops(case.model))
    done = {name: dict(row) for name, row in rows.items() if "failed" not in row}
    ceiling = max((row.get("ceiling_tflops", 0.0) for row in done.values()), default=0.0)
    peak = next((row["peak_tflops"] for row in done.values() if row.get("peak_tflops")), None)
    for row in done.values():
        rate = case.batch / statistics.median(row["seconds"])
        tflops = rate * row.get("flops_per_sample", padded_flops) / 1e12
        row["samples_per_second"] = rate
        if ceiling:
            row["of_ceiling"] = tflops / ceiling
            row["of_ceiling_padded"] = rate * padded_flops / 1e12 / ceiling
        if peak is not None:
            row["mfu"] = tflops / peak
        on_device = row.get("device_memory") or {}
        row["peak_bytes"] = on_device.get("peak_bytes_in_use", row["peak_host_bytes"])
    if PEER in done:
        for name in done.keys() - {PEER}:
            found = ratios(done[name], done[PEER])
            done[name]["ratio_to_eager"] = statistics.median(found)
            done[name]["ratio_range"] = [min(found), max(found)]
        medians = done[PEER]["medians"]
        done[PEER]["drift"] = max(medians) / min(medians) - 1
    if compiled := done.get(COMPILED, {}).get("ratio_to_eager"):
        for row in done.values():
            if "ratio_to_eager" in row:
                row["ratio_to_compiled"] = row["ratio_to_eager"] / compiled
    return {
        "batch": case.batch,
        "precision": case.precision,
        "layers": case.layers,
        "gflops_per_sample": padded_flops / 1e9,
        "ceiling_tflops": ceiling,
        "contenders": {name: done.get(name, rows[name]) for name in CONTENDERS if name in rows},
    }


def ratios(row: Row, peer: Row) -> list[float]:
    """How many times as fast as the peer: of pairs of turns, or of every turn to every one."""
    pairs: Iterable[tuple[float, float]] = itertools.product(row["seconds"], peer["seconds"])
    if "peer_seconds" in row:
        pairs = zip(row["seconds"], row["peer_seconds"], strict=True)
    return [theirs / mine for mine, theirs in pairs]


def show(name: str, found: dict[str, Any]) -> None:
    print(
        f"{name}, batch {found['batch']}, {found['precision']}: {found['gflops_per_sample']:.1f} "
        f"GFLOPs a sample padded, ceiling {found['ceiling_tflops']:.2f} TFLOP/s"
    )
    for contender, row in found["contenders"].items():
        if "failed" in row:
            print(f"  {contender:24} {row['failed']}")
            continue
        shown = [f"{row['samples_per_second']:10.2f} samples/s"]
        if "ratio_to_eager" in row:
            least, most = row["ratio_range"]
            shown.append(f"{row['ratio_to_eager']:.2f}x eager ({least:.2f} to {most:.2f})")
        if "ratio_to_compiled" in row:
            shown.append(f"{row['ratio_to_compiled']:.2f}x compiled")
        if "of_ceiling" in row:
            shown.append(f"{row['of_ceiling']:.1%} of the ceiling")
        if "mfu" in row:
            shown.append(f"MFU {row['mfu']:.1%}")
        shown.append(f"peak {row['peak_bytes'] / 1e9:.1f} GB, first loss {row['first_loss']:.4f}")
        print(f"  {contender:24} {'  '.join(shown)}")
    drift = found["contenders"].get(PEER, {}).get("drift", 0.0)
    if drift > DRIFT:
        print(f"  the eager step's medians differ by {drift:.1%}: the machine's speed changed")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(GPU_BATCH))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS))
    parser.add_argument("--batch", type=int, help="for all models")
    parser.add_argument("--precision", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, help="of a turn")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--seconds", type=float, help="of a model, after which no turn is begun")
    parser.add_argument("--output", type=Path, help="JSON, merged with what is there")
    parser.add_argument("--try", dest="toy", action="store_true", help="a layer a tower, batch 8")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == MACHINE:
        serve(MACHINE, describe)
        return 0
    if arguments.child:
        if arguments.child.startswith("ours") or arguments.child == TUNED:
            use_one_arena()  # as `clip-jax train` does, before JAX starts its threads
        serve(arguments.child, lambda: compete(arguments.child, make_case(*arguments.case)))
        return 0
    machine = Child(MACHINE, [], dict(os.environ)).end()
    if "failed" in machine:
        raise SystemExit(f"JAX finds no device: {machine['failed']}")
    platform = machine["environment"]["platform"]
    on_cpu = platform == "cpu"
    models = arguments.models or (list(CPU_BATCH) if on_cpu else ["ViT-B-32"])
    precision = arguments.precision or ("float32" if on_cpu else "bfloat16")
    steps = arguments.steps or (1 if arguments.toy else 3 if on_cpu else 20)
    seconds = arguments.seconds or (math.inf if on_cpu else GPU_SECONDS)
    names = arguments.contenders or [name for name in CONTENDERS if on_cpu or name != TUNED]
    output = arguments.output
    if output is None and not arguments.toy:
        kind = machine["environment"]["device"].replace(" ", "_").lower()
        output = RESULTS / f"train_step_{kind}.json"
    failed = False
    for name in models:
        layers = (1, 1) if arguments.toy else (4, 4) if on_cpu and name != "ViT-B-32" else None
        batch = arguments.batch or (
            8
            if arguments.toy
            else CPU_BATCH[name]
            if on_cpu
            else gpu_batch(name, machine["memory_bytes"])
        )
        case = make_case(name, batch, precision, layers, platform)
        for rows in measure(case, names, steps, arguments.repeats, seconds):
            found = {"environment": machine["environment"], **summary(case, rows)}
            if output is not None:
                merge_into(output, "models", name, found)
        show(name, found)
        failed |= any("failed" in row for row in found["contenders"].values())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
