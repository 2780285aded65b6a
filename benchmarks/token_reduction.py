"""Training speed against FLOPs where tokens are left out: fewer pixels, masked patches, cut text.

    python benchmarks/token_reduction.py                # CPU: ViT-B/16 of three layers a tower
    python benchmarks/token_reduction.py --models ViT-B-16   # a GPU; a call for each model
    python benchmarks/token_reduction.py --try          # every case at toy sizes, in minutes

CLIPA (Li et al. 2023, "An inverse scaling law for CLIP training") trains at 84 or 112 pixels and
with captions of 8 or 16 tokens; FLIP (Li et al. 2023) leaves out 50 or 75% of the patches. The
step is that of train_step.py (exact loss, AdamW, the batch on the device), a caption to a row. The
cases take turns, --repeats times --steps each, and the median turn counts. FLOPs are analytic.
"of the saving" is the speedup as a share of the one that FLOPs alone would give: what does not
shrink with the tokens (optimizer, loss, small matrices) takes the rest. On a GPU each case is
compiled and timed before the next, eleven of them: after --seconds none is begun, and the run says
which are missing. Merged by model into benchmarks/results/token_reduction_<device>.json.
"""

import argparse
import dataclasses
import gc
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import jax
from environment import environment, merge_into
from train_step import GPU_BATCH, GPU_SECONDS, Case, Contender, Wait, gpu_batch, ours

from clip_jax.config import ModelConfig, preset
from clip_jax.models import forward_flops
from clip_jax.parallel.chips import chip_of
from clip_jax.parallel.host_memory import keep_freed_memory, use_one_arena
from clip_jax.training.throughput import measure_peak

RESULTS = Path(__file__).parent / "results"
CPU_LAYERS, CPU_BATCH = 3, 8
# The embedding table has no FLOPs; on a CPU its update would hide what the tokens cost.
CPU_VOCABULARY = 8192
TOY_LAYERS, TOY_BATCH = 1, 4


@dataclasses.dataclass(frozen=True)
class Reduction:
    pixels: int = 224  # rounded down to whole patches
    masked: float = 0.0  # share of the patches that is left out
    context_length: int = 77

    def of(self, model: ModelConfig) -> ModelConfig:
        image, text = model.image, model.text
        size = self.pixels // image.patch_size * image.patch_size
        image = dataclasses.replace(image, image_size=size, patch_dropout=self.masked)
        text = dataclasses.replace(text, context_length=self.context_length)
        return dataclasses.replace(model, image=image, text=text)


FULL = "224 px, 77 tokens"
CASES = {
    FULL: Reduction(),
    "112 px": Reduction(pixels=112),
    "84 px": Reduction(pixels=84),
    "50% masked": Reduction(masked=0.5),
    "75% masked": Reduction(masked=0.75),
    "32 tokens": Reduction(context_length=32),
    "16 tokens": Reduction(context_length=16),
    "8 tokens": Reduction(context_length=8),
    "FLIP: 50% masked, 32 tokens": Reduction(masked=0.5, context_length=32),
    "CLIPA: 112 px, 16 tokens": Reduction(pixels=112, context_length=16),
    "CLIPA: 84 px, 8 tokens": Reduction(pixels=84, context_length=8),
}


def num_tokens(model: ModelConfig) -> int:
    """Of an image, as the blocks see it in training."""
    image = model.image
    patches = (image.image_size // image.patch_size) ** 2
    return max(1, int(patches * (1 - image.patch_dropout))) + image.class_token


def measure(
    name: str, base: ModelConfig, batch: int, steps: int, repeats: int, seconds: float
) -> dict[str, Any]:
    platform, end = jax.default_backend(), time.monotonic() + seconds
    precision = "float32" if platform == "cpu" else "bfloat16"
    rows: dict[str, dict[str, Any]] = {}
    running: dict[str, tuple[Contender, Wait]] = {}

    def begin(case: str) -> None:
        model = CASES[case].of(base)
        run, wait, figures = ours(Case(name, model, batch, precision, None, platform), packed=False)
        wait(run())
        keep_freed_memory()
        wait(run())
        flops = 3 * sum(forward_flops(model, training=True))
        rows.setdefault(case, {"image_tokens": num_tokens(model), "seconds": []})
        rows[case] |= {"pixels": model.image.image_size, **figures, "flops_per_sample": flops}
        running[case] = run, wait

    def turn(case: str) -> None:
        run, wait = running[case]
        start = time.perf_counter()
        for _ in range(steps):
            result = run()
        wait(result)
        rows[case]["seconds"].append((time.perf_counter() - start) / steps)

    if platform == "cpu":  # all fit into memory together, and take turns
        for case in CASES:
            begin(case)
        for _ in range(repeats):
            for case in CASES:
                turn(case)
    else:  # JAX keeps the memory it has: one after the other, the full one at both ends
        for case in [*CASES, FULL]:
            if time.monotonic() > end and case != FULL:
                continue
            begin(case)
            for _ in range(repeats):
                turn(case)
            running.clear()
            gc.collect()
    full = rows[FULL]
    for row in rows.values():
        row["samples_per_second"] = batch / statistics.median(row["seconds"])
    for row in rows.values():
        row["speedup"] = row["samples_per_second"] / full["samples_per_second"]
        row["flops_saving"] = full["flops_per_sample"] / row["flops_per_sample"]
        row["share_of_saving"] = row["speedup"] / row["flops_saving"]
    return {
        "batch": batch,
        "precision": precision,
        "layers": [base.image.depth, base.text.depth],
        "ceiling_tflops": measure_peak(precision),
        "cases": rows,
    }


def reduced(model: ModelConfig, layers: int) -> ModelConfig:
    text = dataclasses.replace(
        model.text, depth=layers, vocab_size=CPU_VOCABULARY, eot_id=CPU_VOCABULARY - 1
    )
    image = dataclasses.replace(model.image, depth=layers)
    return dataclasses.replace(model, image=image, text=text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(GPU_BATCH), default=["ViT-B-16"])
    parser.add_argument("--batch", type=int, help="for all models")
    parser.add_argument("--steps", type=int, help="of a turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="of a model, after which no case is begun")
    parser.add_argument("--output", type=Path, help="JSON, merged with what is there")
    parser.add_argument("--try", dest="toy", action="store_true", help="one layer, small batches")
    arguments = parser.parse_args()
    use_one_arena()  # as `clip-jax train` does
    on_cpu = jax.default_backend() == "cpu"
    steps = arguments.steps or (1 if on_cpu else 20)
    seconds = arguments.seconds or (math.inf if on_cpu else GPU_SECONDS)
    device, output = jax.local_devices()[0], arguments.output
    if output is None and not arguments.toy:
        kind = device.device_kind.replace(" ", "_").lower()
        output = RESULTS / f"token_reduction_{kind}.json"
    with tempfile.TemporaryDirectory() as folder:  # the full case is compiled twice on a GPU
        jax.config.update("jax_compilation_cache_dir", folder)
        for name in arguments.models:
            chip = chip_of(device)
            batch = arguments.batch or gpu_batch(name, None if chip is None else chip.memory_bytes)
            base = preset(name)
            if on_cpu or arguments.toy:
                base = reduced(base, TOY_LAYERS if arguments.toy else CPU_LAYERS)
                batch = arguments.batch or (TOY_BATCH if arguments.toy else CPU_BATCH)
            found = measure(name, base, batch, steps, arguments.repeats, seconds)
            if output is not None:
                merge_into(output, "models", name, {"environment": environment(), **found})
            print(
                f"{name}, {base.image.depth} and {base.text.depth} layers, batch {batch}, "
                f"{found['precision']}"
            )
            head = "samples/s", "GFLOPs a sample", "speedup", "FLOPs saved", "of the saving"
            print(f"{'':28} {head[0]:>10} {head[1]:>16} {head[2]:>9} {head[3]:>12} {head[4]:>14}")
            for case, row in found["cases"].items():
                print(
                    f"{case:28} {row['samples_per_second']:10.2f} "
                    f"{row['flops_per_sample'] / 1e9:16.2f} {row['speedup']:8.2f}x "
                    f"{row['flops_saving']:11.2f}x {row['share_of_saving']:14.0%}"
                )
            if missing := CASES.keys() - found["cases"].keys():
                print(f"not begun, as --seconds were over: {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main()
