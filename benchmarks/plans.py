"""Plans of four large runs, for hardware that is not at hand: the tables of docs/planning.md.

    python benchmarks/plans.py tpu      # pip install 'clip-jax-training[plan-tpu]'
    python benchmarks/plans.py cuda     # pip install 'clip-jax-training[plan-cuda]'
    python benchmarks/plans.py tables   # those of the JSON files in results/, compiling nothing

Recipes of configs/ at other batch sizes, as `clip-jax plan` makes them, each in a process of its
own; where a recipe does not fit, what the search finds. Nothing runs. Large steps take minutes to
compile, and are compiled once: `--cache` keeps them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "plans.json"
ACCURACY = Path(__file__).parent / "results" / "plan_accuracy.json"  # of plan_accuracy.py
DOCS = ROOT / "docs" / "planning.md"
_GIB = 2**30


class Case(NamedTuple):
    """One run to plan."""

    name: str  # a column of the tables
    compiler: str
    recipe: str
    topology: str
    overrides: tuple[str, ...] = ()


CASES = (
    Case(
        "ViT-B/16, 16k",
        "tpu",
        "laion400m_b16.py",
        "v5e:16x16",
        ("--config.global_batch_size=16384",),
    ),
    Case("ViT-L/14, 32k", "tpu", "openai_clip.py:l14", "v5p:4x4x4"),
    Case("So400m sigmoid, 32k", "tpu", "siglip.py:so400m", "v6e:16x16"),
    Case(
        "ViT-B/16, 4k",
        "cuda",
        "laion400m_b16.py",
        "h100x8",
        ("--config.global_batch_size=4096",),
    ),
)


def plan(case: Case, cache: str) -> dict[str, Any]:
    """What `clip-jax plan --json` writes, and how long the command took."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "plan.json"
        command = [
            *(sys.executable, "-m", "clip_jax.cli", "plan"),
            f"--config=configs/{case.recipe}",
            f"--topology={case.topology}",
            *case.overrides,
            *([f"--config.data.cache_dir={cache}"] if cache else []),
            f"--json={output}",
        ]
        start = time.monotonic()
        # 2: it does not fit, which is a result.
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code not in (0, 2) or not output.exists():
            raise SystemExit(f"{case.name}: clip-jax plan ended with {code}")
        content: dict[str, Any] = json.loads(output.read_text())
    del content["config"]  # that of the recipe, with the overrides above
    if (search := content["search"]) is not None:
        left_out = ("ruled out", "not tried")
        search["attempts"] = [a for a in search["attempts"] if a["verdict"] not in left_out]
    return {
        "case": case._asdict(),
        "command_seconds": round(time.monotonic() - start, 1),
        "plan": content,
    }


def tables(results: list[dict[str, Any]]) -> str:
    """Markdown: a plan a column, then memory, then what is sent."""
    names = [result["case"]["name"] for result in results]
    columns = [_column(result) for result in results]
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    memory = [_memory(result["plan"]) for result in results]
    parts = [[label, *(column[label] for column in memory)] for label in memory[0]]
    sent = [row for result in results for row in _sent(result)]
    return "\n\n".join(
        (
            _markdown(["", *names], rows),
            "Memory of a device, GiB, of what fits:",
            _markdown(["", *names], parts),
            "What a device sends in a step; hidden: behind work that does not wait for it.",
            _markdown(["run", "kind", "along", "link", "times", "MB", "ms", "hidden"], sent),
        )
    )


def _column(result: dict[str, Any]) -> dict[str, str]:
    case, plan = result["case"], result["plan"]
    topology, asked, shown = plan["topology"], plan["asked"], plan["shown"]
    column = {
        "recipe": f"`{case['recipe']}`",
        "topology": f"`{case['topology']}`",
        "chips": f"{topology['num_chips']} {topology['chip']}",
        "as it is": _as_it_is(asked),
    }
    labels = (
        *("planned with", "mesh", "pairs a device", "FLOPs, of 3 x forward", "memory traffic"),
        *("sent", "step time, ms", "bound by", "MFU", "samples/s", "days", "chip-hours"),
    )
    if shown is None:
        left = dict.fromkeys((*labels, "compiled in"), "nothing fits")
        return column | left | {"whole command": _command(result), "findings": "nothing fits"}
    estimate = shown["estimate"]
    data, fsdp, _ = shown["mesh"]
    # Rows of older code, whose last blocks were whole, have the one count alone.
    least = shown.get("least_flops_per_sample", shown["analytic_flops_per_sample"])
    needed = least * shown["global_batch_size"]
    figures = (
        " ".join(f"`{text}`" for text in shown["overrides"]) or "the recipe",
        "x".join(map(str, shown["mesh"])),
        f"{shown['global_batch_size'] // (data * fsdp)}",
        f"{estimate['flops'] * shown['num_devices'] / needed:.3f}",
        f"{estimate['memory_bytes'] / 1e9:,.0f} GB",
        f"{sum(row['num_bytes'] for row in estimate['traffic']) / 1e9:.2f} GB",
        _range(estimate["step_seconds"], 1e3),
        estimate["bound_by"],
        "-" if estimate["mfu"] is None else _percents(estimate["mfu"]),
        _range(estimate["samples_per_second"]),
        _range(estimate["days"]),
        _range(estimate["chip_hours"]),
    )
    codes = ", ".join(f"`{f['code']}`" for f in plan["findings"] if f["code"] != "does-not-fit")
    return (
        column
        | dict(zip(labels, figures, strict=True))
        | {
            "compiled in": f"{shown['compile_seconds']:,.0f} s",
            "whole command": _command(result),
            "findings": codes or "none",
        }
    )


def _command(result: dict[str, Any]) -> str:
    """With what did not fit before what does."""
    search = result["plan"]["search"]
    number = 1 + (0 if search is None else search["num_compiled"])
    return f"{result['command_seconds']:,.0f} s, {number} compilation{'s' if number > 1 else ''}"


def accuracy(results: dict[str, Any]) -> str:
    """Markdown: what was predicted and measured, of each platform that was."""
    sections = []
    for measured in results.values():
        rows = [
            [
                row["size"],
                f"`{row['topology']}`",
                *(f"{row[side]['memory_bytes'] / _GIB:.2f}" for side in ("predicted", "measured")),
                f"{row['memory_error']:+.1%}",
                f"{1e3 * row['predicted']['seconds'][1]:,.0f}",
                f"{1e3 * row['measured']['seconds']:,.0f}",
                f"{row['time_error']:+.1%}",
            ]
            for row in measured["rows"]
        ]
        environment = measured["environment"]
        worst = [
            max(abs(row[f"{of}_error"]) for row in measured["rows"]) for of in ("memory", "time")
        ]
        header = ["size", "topology", "GiB planned", "measured", "error"]
        sections.append(
            f"On {_machine(environment)}: memory within {worst[0]:.0%}, times within "
            f"{worst[1]:.0%}.\n\n" + _markdown([*header, "ms planned", "measured", "error"], rows)
        )
    return "\n\n".join(sections)


def _machine(environment: dict[str, Any]) -> str:
    jax = f"JAX {environment['packages']['jax']}"
    if environment["platform"] == "cpu":
        return f"{environment['cores']} cores of an {environment['processor']} ({jax})"
    return f"{environment['num_devices']} {environment['device']} ({jax})"


def _as_it_is(asked: dict[str, Any]) -> str:
    needs = asked["needed_bytes"]
    figures = "" if needs is None else f": {needs / _GIB:.1f} GiB"
    return f"{asked['verdict']}{figures}"


def _memory(plan: dict[str, Any]) -> dict[str, str]:
    shown, has = plan["shown"], plan["topology"]["usable_bytes"]
    labels = {
        "parameters": "parameters",
        "optimizer": "optimizer",
        "model_state": "statistics, averages",
        "batch": "batch",
        "activations": "activations",
        "temporaries": "temporaries",
        "output": "output",
        "total": "all",
    }
    memory = {} if shown is None else shown["memory"]
    column = {
        label: f"{memory[name] / _GIB:.2f}" if memory else "-" for name, label in labels.items()
    }
    return column | {"can be had": f"{has / _GIB:.2f}"}


def _sent(result: dict[str, Any]) -> list[list[str]]:
    shown = result["plan"]["shown"]
    return [
        [
            result["case"]["name"],
            row["kind"],
            "+".join(row["axes"]),
            row["link"],
            f"{row['times']:,}",
            f"{row['num_bytes'] / 1e6:,.1f}",
            f"{1e3 * row['seconds']:.2f}",
            f"{row['asynchronous']:.0%}",
        ]
        for row in ([] if shown is None else shown["estimate"]["traffic"])
    ]


def _range(values: list[float], unit: float = 1.0) -> str:
    low, high = sorted((values[0], values[2]))
    return " to ".join(_number(unit * value) for value in (low, high)) + (
        f", expected {_number(unit * values[1])}"
    )


def _percents(values: list[float]) -> str:
    low, high = sorted((values[0], values[2]))
    return f"{low:.0%} to {high:.0%}, expected {values[1]:.0%}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_tables(name: str, tables: str) -> None:
    """Puts them between the marks of docs/planning.md that have this name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = DOCS.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise SystemExit(f"{DOCS} has no {begin} ... {end}")
    DOCS.write_text(f"{before}{begin}\n\n{tables}\n\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=("tpu", "cuda", "tables"))
    parser.add_argument("--only", help="of the cases, those with this in their name")
    parser.add_argument("--cache", default="", help="folder that keeps what is compiled")
    arguments = parser.parse_args()
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    by_name = {row["case"]["name"]: row for row in kept}
    for case in CASES:
        if case.compiler != arguments.target or (arguments.only or "") not in case.name:
            continue
        by_name[case.name] = plan(case, arguments.cache)
        rows = [by_name[c.name] for c in CASES if c.name in by_name]
        RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    rows = [by_name[case.name] for case in CASES if case.name in by_name]
    write_tables("tables", tables(rows))
    print(tables(rows))
    if ACCURACY.exists():
        write_tables("accuracy", accuracy(json.loads(ACCURACY.read_text())))


if __name__ == "__main__":
    main()
