"""The quickstart learns the same however it is computed: devices, microbatches, packing, bfloat16.

    python benchmarks/learning_proof.py                        # 15 runs of the recipe: 90 minutes
    python benchmarks/learning_proof.py --steps 600            # with shorter runs: 30 minutes
    python benchmarks/learning_proof.py --variants bf16 --seeds 0

Trains configs/quickstart.py with several seeds on one device, and in each variant, as child
processes. A variant passes where the mean of its scores differs no more than seeds do (`judge`). A
finished run is read, not repeated. Writes benchmarks/results/learning_proof.json.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from environment import environment
from quickstart import ROOT, train
from scipy import stats

RESULTS = ROOT / "benchmarks" / "results" / "learning_proof.json"
METRICS = (
    "eval/unseen_artist/text_to_image_R@1",
    "eval/unseen_artist/zero_shot_100way_top1",
    "eval/unseen_concept/text_to_image_R@10",
)
PADDED = "--config.data.packing.group_size=0"
# Overrides, and the number of simulated devices.
VARIANTS: dict[str, tuple[list[str], int]] = {
    "1 device": ([PADDED], 1),
    "8 devices fsdp": ([PADDED, "--config.mesh=(1, 8, 1)"], 8),
    "4 microbatches": ([PADDED, "--config.microbatches=4"], 1),
    "packed text": ([], 1),
    "bf16": ([PADDED, "--config.precision=bfloat16"], 1),
}


def run(variant: str, seed: int, steps: int, runs: Path) -> dict[str, float]:
    """The last training and evaluation lines of one run."""
    overrides, devices = VARIANTS[variant]
    workdir = runs / f"{variant.replace(' ', '-')}-{steps}-{seed}"
    lines = train(
        workdir,
        *(f"--config.seed={seed}", *overrides),
        *(f"--config.num_steps={steps}", "--config.evaluation.report=False"),
        variables={"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
    )
    training = next(line for line in reversed(lines) if "loss" in line)
    scores = next(line for line in reversed(lines) if METRICS[0] in line)
    return training | scores


def noise_of(groups: list[list[float]]) -> tuple[float, int]:
    """The standard deviation of one run between seeds, from all variants, and its freedom."""
    freedom = sum(len(values) - 1 for values in groups)
    squares = sum((len(values) - 1) * statistics.variance(values) for values in groups)
    return math.sqrt(squares / freedom), freedom


def judge(
    values: list[float], reference: list[float], noise: float, freedom: int, comparisons: int
) -> dict[str, Any]:
    """Whether two means differ by more than seeds do, at 5% for all comparisons together.

    Student's t with Bonferroni's correction: of so many comparisons, some lie outside of a limit
    made for one.
    """
    difference = statistics.mean(values) - statistics.mean(reference)
    quantile = float(stats.t.ppf(1 - 0.05 / 2 / comparisons, freedom))
    limit = quantile * noise * math.sqrt(1 / len(values) + 1 / len(reference))
    return {"difference": difference, "limit": limit, "within_noise": abs(difference) <= limit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learning-proof")
    arguments = parser.parse_args()
    names = ["1 device", *(name for name in arguments.variants if name != "1 device")]

    found = {}
    for seed in arguments.seeds:  # seed by seed: an interruption leaves whole comparisons
        for name in names:
            found[name, seed] = run(name, seed, arguments.steps, arguments.runs)
    result: dict[str, Any] = {
        "environment": environment(),
        "num_steps": arguments.steps,
        "seeds": arguments.seeds,
        "variants": {},
    }
    print(
        f"{'variant':16} {'metric':42} {'mean':>7} {'values':>40} {'difference':>11} {'limit':>7}"
    )
    scores = {
        (name, metric): [found[name, seed][metric] for seed in arguments.seeds]
        for name in names
        for metric in METRICS
    }
    comparisons = (len(names) - 1) * len(METRICS)
    for name in names:
        rows: dict[str, Any] = {}
        for metric in METRICS:
            values, verdict = scores[name, metric], {}
            if name != "1 device" and len(values) > 1:
                noise = noise_of([scores[other, metric] for other in names])
                verdict = judge(values, scores["1 device", metric], *noise, comparisons)
            rows[metric] = {"mean": statistics.mean(values), "values": values, **verdict}
            spelled = " ".join(f"{value:7.2%}" for value in values)
            against = f"{verdict['difference']:+11.2%}" if verdict else ""
            limit = f"{verdict['limit']:7.2%}" if verdict else ""
            print(
                f"{name:16} {metric:42} {rows[metric]['mean']:7.2%} {spelled:>40} {against} {limit}"
            )
        rows["loss"] = [found[name, seed]["loss"] for seed in arguments.seeds]
        rows["train_seconds"] = [found[name, seed]["train_seconds"] for seed in arguments.seeds]
        result["variants"][name] = rows
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
