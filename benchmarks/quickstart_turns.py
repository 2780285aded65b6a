"""How long the quickstart takes beside an earlier commit of this repository, in turns.

    python benchmarks/quickstart_turns.py --before 695edb8~1

Both run `clip-jax train` on their own configs/quickstart.py, --steps of it and its evaluation, one
after the other, --turns times: the speed of a shared machine drifts more from hour to hour than the
two differ. Printed are the seconds of the whole command and the samples a second between its
lines, with the ratios of the pairs of turns; written to benchmarks/results/quickstart_turns.json.
The scores of whole runs are those of quickstart.py and learning_proof.py.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from environment import environment
from quickstart import ROOT, median_rate, train

RESULT = ROOT / "benchmarks" / "results" / "quickstart_turns.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="commit")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--turns", type=int, default=4)
    arguments = parser.parse_args()
    git = ["git", "-C", str(ROOT)]
    before = subprocess.check_output([*git, "rev-parse", "--short", arguments.before], text=True)
    seconds: dict[str, list[float]] = {"before": [], "after": []}
    rates: dict[str, list[float]] = {"before": [], "after": []}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        subprocess.run(
            [*git, "worktree", "add", "--quiet", "--detach", tree, arguments.before], check=True
        )
        try:
            for number in range(arguments.turns):
                for name, root in (("before", tree), ("after", ROOT)):
                    workdir = Path(folder) / f"{name}-{number}"
                    begin = time.perf_counter()
                    lines = train(workdir, f"--config.num_steps={arguments.steps}", root=root)
                    taken, rate = time.perf_counter() - begin, median_rate(lines)
                    seconds[name].append(taken)
                    rates[name].append(rate)
                    print(f"turn {number + 1}, {name:6} {taken:6.1f} s {rate:6.0f} samples/s")
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", tree], check=True)
    ratios = {
        "seconds": [b / a for b, a in zip(seconds["before"], seconds["after"], strict=True)],
        "rates": [a / b for b, a in zip(rates["before"], rates["after"], strict=True)],
    }
    for what, values in (
        ("time of the command before over after", ratios["seconds"]),
        ("samples a second after over before", ratios["rates"]),
    ):
        print(f"{what}: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
    found = {
        "environment": environment(),
        "before": before.strip(),
        "num_steps": arguments.steps,
        "command_seconds": seconds,
        "samples_per_second": rates,
        "ratios_of_turns": ratios,
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["environment"]))


if __name__ == "__main__":
    main()
