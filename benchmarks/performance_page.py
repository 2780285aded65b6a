"""The tables of docs/performance.md, between its marks, out of benchmarks/results.

python benchmarks/performance_page.py    # after the benchmarks that write there
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
DETAILED = "ViT-B-16"

Found = dict[str, Any]  # what a benchmark has written


def table(*rows: Iterable[str]) -> str:
    """Markdown; the first row is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * (lines[0].count("|") - 1) + "|", *lines[1:]])


# ---- The roofline ----------------------------------------------------------------------------


def ridges(found: Found) -> str:
    chips = found["chips"].values()
    return table(
        ("", *found["chips"]),
        ("bfloat16 TFLOP/s", *(f"{c['flops'] / 1e12:,.0f}" for c in chips)),
        ("GB/s of memory", *(f"{c['bandwidth'] / 1e9:,.0f}" for c in chips)),
        ("ridge, FLOPs a byte", *(f"{c['flops'] / c['bandwidth']:,.0f}" for c in chips)),
    )


def shares(found: Found) -> str:
    rows = []
    for name, preset in found["presets"].items():
        total = sum(part["flops"] for part in preset["parts"])
        image, text = (
            sum(p["flops"] for p in preset["parts"] if p["name"].startswith(tower)) / total
            for tower in ("image", "text")
        )
        cells = (f"{share:.1%}" for share in (image, text, 1 - image - text))
        moved, scores = preset["megabytes"], preset["scores_megabytes"]
        rows.append((name, f"{total / 1e9:,.1f}", *cells, f"{moved:,.0f}", f"{scores:,.0f}"))
    head = "preset", "GFLOPs a sample", "image", "text", "the rest", "MB a sample"
    return table((*head, "more, with scores in memory"), *rows)


def parts(found: Found) -> str:
    preset = found["presets"][DETAILED]
    total = sum(part["flops"] for part in preset["parts"])
    rows = []
    for part in preset["parts"]:
        flops, moved = part["flops"], part["num_bytes"]
        bounds = [
            "memory" if flops / moved < chip["flops"] / chip["bandwidth"] else "products"
            for chip in found["chips"].values()
        ]
        figures = f"{flops / 1e9:.2f}", f"{flops / total:.1%}", f"{moved / 1e6:.1f}"
        rows.append((part["name"], *figures, f"{flops / moved:,.0f}", *bounds))
    head = f"part of {DETAILED}", "GFLOPs", "share", "MB", "FLOPs a byte", *found["chips"]
    return table(head, *rows)


def least(found: Found) -> str:
    rows = []
    for name, preset in found["presets"].items():
        cells = (
            f"{chip['samples_per_second']:,.0f}: {chip['most_of_peak']:.0%} "
            f"({chip['most_of_peak_unfused']:.0%})"
            for chip in preset["chips"].values()
        )
        rows.append((name, *cells))
    return table(("preset", *found["chips"]), *rows)


def low_precision(found: Found) -> str:
    rows = []
    for name, preset in found["presets"].items():
        cells = (f"{chip['low_precision_speedup']:.2f}x" for chip in preset["chips"].values())
        rows.append((name, f"{preset['wide_share']:.1%}", *cells))
    return table(("preset", "FLOPs in wide products", *found["chips"]), *rows)


def profile(found: Found) -> str:
    profile = found["profile"]
    flops, seconds = profile["flops_per_sample"], profile["seconds"]
    work = {
        "whole step, padded": 3 * (flops["image"] + flops["text"]),
        "image tower": 3 * flops["image"],
        "text tower, padded": 3 * flops["text"],
    }
    rows = []
    for name, taken in seconds.items():
        rate = ""
        if name in work:
            reached = work[name] * profile["batch"] / taken
            rate = f"{reached / profile['ceiling_tflops'] / 1e12:.0%}"
        share = f"{taken / seconds['whole step, padded']:.1%}"
        rows.append((name, f"{1000 * taken:,.0f}", share, rate))
    return table(("", "ms", "of the padded step", "of the ceiling"), *rows)


# ---- The other benchmarks --------------------------------------------------------------------


def steps(found: Found) -> str:
    """A table for each model."""
    made = []
    for name, model in found["models"].items():
        layers = f" of {' and '.join(map(str, model['layers']))} layers" if model["layers"] else ""
        rows = [(contender, *_step(row)) for contender, row in model["contenders"].items()]
        head = "", "samples/s", "of open_clip's eager step", "of its compiled step"
        what = f"{name}{layers}, batch {model['batch']}, {model['precision']}, {_machine(model)}"
        ceiling = f"{what}; the ceiling is {model['ceiling_tflops']:.2f} TFLOP/s"
        made.append(f"{ceiling}:\n\n{table((*head, 'of the ceiling', 'peak GB'), *rows)}")
    return "\n\n".join(made)


def _step(row: Found) -> tuple[str, str, str, str, str]:
    if "failed" in row:
        return row["failed"], "", "", "", ""
    eager = compiled = ceiling = ""
    if "ratio_to_eager" in row:
        least, most = row["ratio_range"]
        eager = f"{row['ratio_to_eager']:.2f}x ({least:.2f} to {most:.2f})"
    if "ratio_to_compiled" in row:
        compiled = f"{row['ratio_to_compiled']:.2f}x"
    if "of_ceiling" in row:
        ceiling = f"{row['of_ceiling']:.0%}"
    rate, memory = f"{row['samples_per_second']:,.2f}", f"{row['peak_bytes'] / 1e9:.1f}"
    return rate, eager, compiled, ceiling, memory


def programs(found: Found) -> str:
    """Steps compiled for a GPU that is not there."""
    rows = [
        (
            name,
            str(row["batch"]),
            f"{row['tflops']:.1f}",
            f"{row['flops_over_analytic']:.3f}",
            f"{row['float32_share_of_flops']:.2%}",
            f"{row['temporary_gb']:.1f}",
            f"{row['attention_scores_gb']:.1f}",
            f"{row['least_ms_at_peak']:.0f}",
        )
        for name, row in found["programs"].items()
    ]
    head = "", "batch", "TFLOPs a step", "of the analytic count", "in float32", "GB of temporaries"
    return table((*head, "of them scores", "ms at the data sheet's peak"), *rows)


def tokens(found: Found) -> str:
    """A table for each model."""
    made = []
    for name, model in found["models"].items():
        layers = " and ".join(map(str, model["layers"]))
        rows = [
            (
                case,
                str(row["image_tokens"]),
                f"{row['samples_per_second']:,.1f}",
                f"{row['flops_per_sample'] / 1e9:.2f}",
                f"{row['speedup']:.2f}x",
                f"{row['flops_saving']:.2f}x",
                f"{row['share_of_saving']:.0%}",
            )
            for case, row in model["cases"].items()
        ]
        head = "", "image tokens", "samples/s", "GFLOPs a sample", "speedup", "FLOPs saved"
        what = f"{name} of {layers} layers, batch {model['batch']}, {model['precision']}"
        made.append(f"{what}, {_machine(model)}:\n\n{table((*head, 'of the saving'), *rows)}")
    return "\n\n".join(made)


def tars(found: Found) -> str:
    rows = [
        (
            f"{name}, {row['image_size']} px, {' and '.join(map(str, row['layers']))} layers, "
            f"{_machine(row)}",
            str(row["batch"]),
            f"{row['samples_per_second']:,.0f}",
            f"{row['step_alone_samples_per_second']:,.0f}",
            f"{row['share']:.1%}",
            f"{row['data_wait']:.1%}",
            f"{row['cores_that_feed_it']:.2f}" if "cores_that_feed_it" in row else "",
        )
        for name, row in found["models"].items()
    ]
    head = "", "batch", "from tars, samples/s", "step alone", "share", "data wait"
    return table((*head, "cores that feed the step"), *rows)


def _machine(model: Found) -> str:
    environment = model["environment"]
    on_cpu = environment["platform"] == "cpu"
    return f"{environment['cores']} CPU cores" if on_cpu else str(environment["device"])


def main() -> None:
    roofline = json.loads((RESULTS / "roofline.json").read_text())
    made = {
        "ridges": ridges(roofline),
        "shares": shares(roofline),
        "parts": parts(roofline),
        "least": least(roofline),
        "low precision": low_precision(roofline),
    }
    if "profile" in roofline:
        made["profile"] = profile(roofline)
    for name, file, make in (
        ("steps", "train_step_[!a]*", steps),
        ("programs", "train_step_aot", programs),
        ("tokens", "token_reduction_*", tokens),
        ("tars", "end_to_end_*", tars),
    ):
        found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{file}.json"))]
        if found:
            made[name] = "\n\n".join(map(make, found))
    text = DOCUMENT.read_text()
    for name, lines in made.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, t=lines: f"{m[1]}{t}\n{m[2]}", text)
        assert count == 1, f"no marks of {name} in {DOCUMENT}"
        print(f"{lines}\n")
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
