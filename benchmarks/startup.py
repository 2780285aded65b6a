"""Time from the command to the first step, with an empty and a filled compilation cache.

    python benchmarks/startup.py
    python benchmarks/startup.py --models quickstart --repeats 1     # the quick look

Each start is `clip-jax train` for one step, in a process of its own, as a user starts it; the time
ends when the step's line is in metrics.jsonl. Cold: the cache folder is empty. Warm: a start before
has filled it; its best of several counts. "All" keeps what JAX leaves out of the cache otherwise,
which is what it compiles in less than a second. Also how long `clip-jax --help` and an error in a
config take, and which packages they import.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from environment import environment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "startup.json"
# clip-jax itself, of this environment, whether or not its script is on the path.
CLIP_JAX = [sys.executable, "-c", "import sys; from clip_jax.cli import main; sys.exit(main())"]

# The quickstart, or its pictures in as many pixels as another model takes. Nothing is scored.
RECIPES = {
    "quickstart": """
import runpy

def get_config():
    config = runpy.run_path({path!r})["get_config"]()
    config.num_steps = config.schedule.warmup_steps = 1
    config.evaluation.sets = {{}}
    return config
""",
    "other": """
from clip_jax.config import *

def get_config():
    return to_config_dict(
        ExperimentConfig(
            name={name!r},
            num_steps=1,
            global_batch_size={batch},
            precision="float32",
            schedule=ScheduleConfig(warmup_steps=1),
            model=preset({name!r}),
            data=DataConfig(
                sources={{"base": SourceConfig(kind="quickstart", path="base")}}, num_threads=2
            ),
        )
    )
""",
}


def start(
    model: str, batch: int, cache: Path, scratch: Path, *, keep_all: bool = False
) -> dict[str, float]:
    """Seconds of one start: all, before `train`, compiling, and the rest."""
    recipe = scratch / f"{model}.py"
    text = RECIPES.get(model, RECIPES["other"])
    path = str(ROOT / "configs" / "quickstart.py")
    recipe.write_text(text.format(name=model, batch=batch, path=path))
    with tempfile.TemporaryDirectory(dir=scratch) as workdir:
        variables = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
        if keep_all:
            variables["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        before = time.time()
        process = subprocess.run(
            [*CLIP_JAX, "train", f"--config={recipe}", f"--workdir={workdir}"],
            env=variables,
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode:
            sys.exit(process.stderr)
        text = (Path(workdir) / "metrics.jsonl").read_text()
    line = next(x for x in map(json.loads, text.splitlines()) if "loss" in x)
    seconds = line["unix_time"] - before
    parts = {
        "before_train": seconds - line["train_seconds"],
        "compiling": line["compile_seconds"],
        "the_step": line["productive_seconds"],
    }
    return {"seconds": seconds, **parts, "the_rest": seconds - sum(parts.values())}


def starts(model: str, batch: int, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        # Builds the set of pictures where it is not there yet; its cache is thrown away.
        start(model, batch, scratch / "unused", scratch)
        result = {"cold": start(model, batch, scratch / "some", scratch)}
        start(model, batch, scratch / "all", scratch, keep_all=True)
        for name, keep_all in (("warm", False), ("warm_all", True)):
            cache = scratch / ("all" if keep_all else "some")
            turns = [start(model, batch, cache, scratch, keep_all=keep_all) for _ in range(repeats)]
            result[name] = min(turns, key=lambda turn: turn["seconds"])
    print(f"{model} (batch {batch}): seconds to the first step")
    names = list(result["cold"])
    print(" " * 10 + "".join(f"{name:>20}" for name in names))
    for kind, seconds in result.items():
        print(f"  {kind:8}" + "".join(f"{seconds[name]:20.1f}" for name in names), flush=True)
    return {"batch": batch, **result}


def command(name: str, arguments: list[str], code: int, repeats: int) -> dict[str, Any]:
    """Best seconds of a command that should be quick, and what it spends on imports."""
    best = float("inf")
    for _ in range(repeats):
        before = time.perf_counter()
        process = subprocess.run(
            [*CLIP_JAX, *arguments], cwd=ROOT, capture_output=True, check=False
        )
        best = min(best, time.perf_counter() - before)
        assert process.returncode == code, process.stderr.decode()
    traced = subprocess.run(
        [sys.executable, "-X", "importtime", *CLIP_JAX[1:], *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    imports: Counter[str] = Counter()
    for match in re.finditer(r"^import time: +(\d+) \| +\d+ \| +(\w+)", traced.stderr, re.M):
        imports[match[2]] += int(match[1])
    slowest = {package: micros / 1e6 for package, micros in imports.most_common(5)}
    listed = ", ".join(f"{package} {1000 * seconds:.0f} ms" for package, seconds in slowest.items())
    print(f"{name}: {best:.2f} s; slowest imports: {listed}", flush=True)
    return {"seconds": best, "import_seconds": slowest}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["quickstart", "ViT-B-32"])
    parser.add_argument("--batch", type=int, default=8, help="of all models but quickstart (128)")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    error = ["train", "--config=configs/quickstart.py", "--workdir=x", "--config.num_stepps=3"]
    batches = dict.fromkeys(arguments.models, arguments.batch) | {"quickstart": 128}
    result: dict[str, Any] = {
        "commands": {
            "--help": command("clip-jax --help", ["--help"], 0, arguments.repeats),
            "config error": command("an error in a config", error, 2, arguments.repeats),
        },
        "models": {
            model: starts(model, batches[model], arguments.repeats) for model in arguments.models
        },
        "environment": environment(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
