"""What happens to a run that is killed, told to stop, or meets a fault: nothing is lost.

    python benchmarks/faults.py                       # all of it, about a quarter of an hour
    python benchmarks/faults.py --kills 2 --stops 1   # a try

A small run is killed with SIGKILL at random instants, half of them while it saves, and stopped with
SIGTERM; it is started again each time by the same command. Every field of its metrics that is not
a time must equal, bit for bit and at every step, that of a run which nothing disturbed. Then other
devices, and one fault after the other: each row of the table says what must happen and what did.
Writes benchmarks/results/faults.json.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from environment import environment
from fault_runs import NUM_STEPS, Child, facts, free_port, recipe, steps_of

RESULTS = Path(__file__).parent / "results" / "faults.json"


# ---- Killed and stopped ----------------------------------------------------------------------


def interrupt(
    folder: Path, config: Path, reference: Path, kills: int, stops: int
) -> dict[str, Any]:
    """Runs with `kills` SIGKILLs and `stops` SIGTERMs, as many of them as that needs."""
    rng = random.Random(0)
    plan = ["kill"] * (kills - kills // 2) + ["kill in a save"] * (kills // 2) + ["stop"] * stops
    rng.shuffle(plan)
    done, runs = 0, []
    while done < len(plan):
        workdir = folder / f"interrupted-{len(runs)}"
        starts = 0
        while True:
            child, starts = Child(config, workdir), starts + 1
            if done == len(plan):
                assert child.wait() == 0, child.said()
                break
            if _strike(child, plan[done], rng):
                done += 1
            elif child.wait() == 0:
                break  # it was faster
        runs.append({"starts": starts, "differing": _differences(workdir, reference)})
        print(f"  run {len(runs)}: {starts} starts, {len(runs[-1]['differing'])} differing fields")
    return {
        "kills": kills - kills // 2,
        "kills_during_a_save": kills // 2,
        "stops": stops,
        "num_steps": NUM_STEPS,
        "fields_compared": sorted({key for line in facts(reference) for key in line}),
        "runs": runs,
    }


def _strike(child: Child, how: str, rng: random.Random) -> bool:
    """Whether the child could be interrupted before it was done."""
    if not child.trains():
        return False
    if how == "kill in a save":
        if not child.saves():
            return False
        time.sleep(rng.uniform(0, 0.03))
    else:
        time.sleep(rng.uniform(0, 1.5))
    if child.poll() is not None:
        return False
    child.send(signal.SIGTERM if how == "stop" else signal.SIGKILL)
    code = child.wait()
    if how == "stop" and code == 0:
        return False  # it was done in that moment
    assert code == (130 if how == "stop" else -signal.SIGKILL), (code, child.said())
    return True


def _differences(workdir: Path, reference: Path) -> list[str]:
    ours, theirs = facts(workdir), facts(reference)
    if len(ours) != len(theirs):
        return [f"{len(ours)} lines, not {len(theirs)}"]
    return [
        f"step {b['step']} {key}: {a.get(key)} != {b.get(key)}"
        for a, b in zip(ours, theirs, strict=True)
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def other_devices(folder: Path, config: Path, reference: Path) -> dict[str, Any]:
    """Eight devices, stopped half way, then four: the largest relative difference of a loss."""
    workdir = folder / "other-devices"
    child = Child(config, workdir, devices=8)
    while steps_of(workdir) < NUM_STEPS // 2:
        time.sleep(0.01)
    child.send(signal.SIGTERM)
    assert child.wait() == 130, child.said()
    stopped = steps_of(workdir)
    assert Child(config, workdir, devices=4).wait() == 0
    pairs = [(a, b) for a, b in zip(facts(workdir), facts(reference), strict=True) if "loss" in a]
    assert all(a["samples_seen"] == b["samples_seen"] for a, b in pairs)
    largest = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs)
    return {"devices": [8, 4], "stopped_at": stopped, "largest_relative_difference": largest}


# ---- One fault after the other ---------------------------------------------------------------


def corrupted(folder: Path, config: Path, reference: Path) -> dict[str, Any]:
    """A flipped bit in the newest checkpoint: it is named, and the one before it is used."""
    return _damage(folder / "corrupted", config, reference, _flip_a_bit)


def unreadable(folder: Path, config: Path, reference: Path) -> dict[str, Any]:
    """A file of the newest checkpoint is gone: as above."""
    return _damage(folder / "unreadable", config, reference, Path.unlink)


def _damage(
    workdir: Path, config: Path, reference: Path, spoil: Callable[[Path], Any]
) -> dict[str, Any]:
    child = Child(config, workdir)
    while steps_of(workdir) < NUM_STEPS // 2:
        time.sleep(0.01)
    child.send(signal.SIGTERM)
    assert child.wait() == 130, child.said()
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    files = [path for path in newest.rglob("*") if path.is_file()]
    spoil(max(files, key=lambda path: path.stat().st_size))
    again = Child(config, workdir)
    assert again.wait() == 0, again.said()
    said = [line for line in again.said().splitlines() if newest.name in line]
    kept = [path.name for path in newest.parent.iterdir() if newest.name in path.name]
    return {
        "behavior": "named in a line, set aside, the one before it used; same numbers",
        "said": [line.replace(str(workdir.parent), "") for line in said[:2]],
        "set_aside": kept,
        "differing_fields": len(_differences(workdir, reference)),
    }


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def full_disk(folder: Path, config: Path, reference: Path) -> dict[str, Any]:
    """A file system that fills up while the run saves: one line, the checkpoint before it usable.

    The run goes on where it was when there is room again.
    """
    workdir, namespace = folder / "full", ("unshare", "--user", "--map-root-user", "--mount")
    workdir.mkdir()
    keep = folder / "kept"  # what was on the small disk, when the child has ended
    script = (
        f"mount -t tmpfs -o size=4m tmpfs {workdir} && "
        f'"$@"; code=$?; cp -r {workdir} {keep}; exit $code'
    )
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        return {"behavior": "not run: no file system can be mounted here"}
    child = Child(config, workdir, prefix=(*namespace, "sh", "-c", script, "sh"))
    code = child.wait()
    said = [line for line in child.said().splitlines() if line.startswith("clip-jax: ")]
    steps = [p.name for p in (keep / "checkpoints").iterdir()]
    again = Child(config, keep)
    assert again.wait() == 0, again.said()
    return {
        "behavior": "exit code 2, one line, the checkpoint before it usable; same numbers",
        "exit_code": code,
        "said": [line.replace(str(folder), "") for line in said],
        "checkpoints_left": sorted(steps),
        "differing_fields": len(_differences(keep, reference)),
    }


def not_finite(folder: Path, config: Path, reference: Path) -> dict[str, Any]:
    """A learning rate that makes every loss NaN from the second step on: left out, then the end."""
    workdir = folder / "not-finite"
    child = Child(config, workdir, "--config.optimizer.learning_rate=1e30")
    code = child.wait()
    lines = [line for line in facts(workdir) if "loss" in line]
    return {
        "behavior": "updates left out and counted; exit code 2 and one line after 20 in a row",
        "exit_code": code,
        "said": [line for line in child.said().splitlines() if line.startswith("clip-jax: ")],
        "skipped_steps": [line["skipped_steps"] for line in lines][-1],
        "losses_that_are_null": sum(line["loss"] is None for line in lines),
    }


def process_killed(folder: Path, config: Path, reference: Path) -> dict[str, Any]:
    """One of two processes is killed, the coordinator or the other: the second one ends too."""
    found: dict[str, Any] = {
        "behavior": "the other one says which and exits with 75 within the heartbeat limit; the "
        "same command goes on: same losses"
    }
    for victim in (1, 0):
        workdir = folder / f"two-{victim}"

        def start(workdir: Path = workdir) -> list[Child]:
            by_hand = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
            return [
                Child(config, workdir, *by_hand, f"--process_id={i}", devices=4) for i in range(2)
            ]

        children = start()
        while steps_of(workdir) < NUM_STEPS // 2:
            assert children[0].poll() is None, children[0].said()
            time.sleep(0.01)
        children[victim].send(signal.SIGKILL)
        killed = time.monotonic()
        code = children[1 - victim].wait()
        seconds = time.monotonic() - killed
        said = children[1 - victim].said()
        for child in start():
            assert child.wait() == 0, child.said()
        pairs = zip(facts(workdir), facts(reference), strict=True)
        errors = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs if "loss" in a]
        found["other" if victim else "coordinator"] = {
            "exit_code": code,
            "seconds_until_the_end": round(seconds, 2),
            "said": [line for line in said.splitlines() if line.startswith("clip-jax: ")],
            "largest_relative_difference": max(errors),
        }
    return found


FAULTS = (corrupted, unreadable, full_disk, not_finite, process_killed)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=5)
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="clip-jax-faults-"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
    try:
        config, reference = recipe(folder), folder / "reference"
        child = Child(config, reference)
        assert child.wait() == 0, child.said()
        result: dict[str, Any] = {"environment": environment()}
        print(f"{arguments.kills} times SIGKILL, {arguments.stops} times SIGTERM:")
        result["interrupted"] = interrupt(
            folder, config, reference, arguments.kills, arguments.stops
        )
        result["other_devices"] = other_devices(folder, config, reference)
        print(f"8 devices, then 4: {result['other_devices']}")
        for fault in FAULTS:
            result[fault.__name__] = fault(folder, config, reference)
            print(f"{fault.__name__}: {json.dumps(result[fault.__name__], indent=1)}")
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
