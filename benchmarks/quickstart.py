"""The quickstart over several seeds: scores beside chance, and the time it took.

    python benchmarks/quickstart.py --seeds 0 1 2 --runs runs/seeds

Runs `clip-jax train` on configs/quickstart.py once for each seed (a finished run is read, not
repeated), prints a table and writes benchmarks/results/quickstart.json. Beside ours stands what a
small CNN of an earlier attempt reached in 330 s at 32 x 32 pixels on the same two cores; it is
quoted, not run here.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from environment import environment

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "quickstart.json"
METRICS = {
    "eval/unseen_artist/text_to_image_R@1": 0.08,
    "eval/unseen_artist/text_to_image_R@5": None,
    "eval/unseen_artist/text_to_image_R@10": None,
    "eval/unseen_artist/image_to_text_R@1": None,
    "eval/unseen_artist/zero_shot_100way_top1": 0.28,
    "eval/unseen_concept/text_to_image_R@1": None,
    "eval/unseen_concept/text_to_image_R@10": 0.24,
    "eval/unseen_concept/zero_shot_100way_top1": None,
}


def train(
    workdir: Path, *overrides: str, root: Path = ROOT, variables: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Trains by configs/quickstart.py of the code in `root`: the lines of metrics.jsonl."""
    command = [
        *(sys.executable, "-c", "import sys; from clip_jax.cli import main; sys.exit(main())"),
        *("train", "--config=configs/quickstart.py", f"--workdir={workdir.absolute()}"),
        *overrides,
    ]
    environ = os.environ | {"PYTHONPATH": str(root)} | dict(variables or {})
    subprocess.run(command, cwd=root, env=environ, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def median_rate(lines: list[dict[str, Any]]) -> float:
    """Samples a second."""
    return statistics.median(line["samples_per_second"] for line in lines if "loss" in line)


def run(seed: int, runs: Path) -> dict[str, float]:
    """The last training and evaluation lines of the run of one seed, in one dict."""
    lines = train(runs / f"seed{seed}", f"--config.seed={seed}")
    last = [line for line in lines if "loss" in line][-1]
    return last | lines[-1] | {"median_samples_per_second": median_rate(lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "seeds")
    arguments = parser.parse_args()
    found = {seed: run(seed, arguments.runs) for seed in arguments.seeds}

    rows = {}
    print(f"{'metric':45} {'mean':>7} {'min':>7} {'max':>7} {'chance':>7} {'CNN':>6}")
    for name, earlier in METRICS.items():
        values = [metrics[name] for metrics in found.values()]
        chance = next(iter(found.values()))[f"{name}/chance"]
        rows[name] = {
            "mean": statistics.mean(values),
            "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
            "values": values,
            "chance": chance,
            "earlier_cnn": earlier,
        }
        quoted = f"{earlier:6.0%}" if earlier is not None else "     -"
        print(
            f"{name:45} {statistics.mean(values):7.1%} {min(values):7.1%} {max(values):7.1%} "
            f"{chance:7.2%} {quoted}"
        )
    seconds = {seed: metrics["train_seconds"] for seed, metrics in found.items()}
    rates = {seed: metrics["median_samples_per_second"] for seed, metrics in found.items()}
    for seed in found:
        print(f"seed {seed}: {seconds[seed]:.0f} s to the last step, {rates[seed]:,.0f} samples/s")
    first = next(iter(found.values()))
    result = {
        "environment": environment(),
        "pairs": {
            name: first[f"eval/{name}/num_pairs"] for name in ("unseen_artist", "unseen_concept")
        },
        "scores": rows,
        "train_seconds_compilation_included": list(seconds.values()),
        "median_samples_per_second": list(rates.values()),
        "seeds": list(found),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["environment"]))


if __name__ == "__main__":
    main()
