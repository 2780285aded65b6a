"""What `clip-jax plan` says of a step's memory and time, against what they are.

    python benchmarks/plan_accuracy.py                  # CPU: three sizes on one and two devices
    python benchmarks/plan_accuracy.py --platform=gpu --topology=h200x1   # plan-cuda installed
    python benchmarks/plan_accuracy.py --try            # the smallest, in a minute

Plans and runs are processes of their own. A plan is made as the command makes it, calibrated on
this machine beforehand (CPUs) or from the data sheet alone (GPUs, for devices that need not be
there). A run makes the state and a batch and takes steps; its memory is the most that the process
held (VmHWM) above what it held with the programs compiled and no array made, or the device's own
peak_bytes_in_use; its time is the median step. Goals: memory within 10% (GPUs 5%), times within
25%. Writes benchmarks/results/plan_accuracy.json.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan_accuracy.json"
MEMORY_GOAL = {"cpu": 0.10, "gpu": 0.05}
TIME_GOAL = 0.25
_NUM_STEPS = {"cpu": 5, "gpu": 20}


@dataclasses.dataclass(frozen=True)
class Size:
    """Both towers of one width and depth; or a preset, where it is named."""

    width: int
    depth: int
    batch: int
    preset: str | None = None


# Peaks of 1 to 3.6 GB, steps of 1 to 5 s on two cores.
SIZES = {
    "cpu": {"192": Size(192, 6, 16), "384": Size(384, 6, 16), "512": Size(512, 6, 12)},
    "gpu": {
        "B/32": Size(768, 12, 1024, "ViT-B-32"),
        "B/16": Size(768, 12, 384, "ViT-B-16"),
        "L/14": Size(1024, 24, 128, "ViT-L-14"),
    },
}


def config_of(platform: str, size: Size) -> Any:
    from clip_jax.config import preset
    from clip_jax.planning.calibration_steps import vit_config

    config = vit_config(
        width=size.width,
        depth=size.depth,
        batch=size.batch,
        precision="float32" if platform == "cpu" else "bfloat16",
    )
    if size.preset is None:
        return config
    return dataclasses.replace(config, model=preset(size.preset))


# ---- Processes -----------------------------------------------------------------------------------


def plan(platform: str, topology_name: str, size: Size, cache: Path) -> dict[str, Any]:
    """What is predicted."""
    from clip_jax.planning.calibration import load_calibration
    from clip_jax.planning.compiling import compile_step
    from clip_jax.planning.estimate import estimate
    from clip_jax.planning.topology import open_topology

    topology = open_topology(topology_name)
    step = compile_step(config_of(platform, size), topology, cache=None, must_fit=False)
    calibration = load_calibration(topology, cache) if platform == "cpu" else None
    found = estimate(step, topology, calibration=calibration)
    return {
        "memory_bytes": step.memory.total * topology.num_devices,
        "memory": dataclasses.asdict(step.memory),
        "seconds": list(found.step_seconds),
        "flops": found.flops * topology.num_devices,
        "traffic_bytes": found.memory_bytes * topology.num_devices,
        "compile_seconds": step.compile_seconds,
    }


def run(platform: str, num_devices: int, size: Size) -> dict[str, Any]:
    """What is measured."""
    import jax

    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", num_devices)
    from clip_jax.planning.calibration_steps import RunningStep

    devices = jax.devices()[:num_devices]
    step = RunningStep(config_of(platform, size), devices)
    before = _begin_to_count() if platform == "cpu" else 0
    step.start()
    step.run()
    seconds = [step.run() for _ in range(_NUM_STEPS[platform])]
    if platform == "cpu":
        held = _status("VmHWM") - before
    else:
        held = sum(device.memory_stats()["peak_bytes_in_use"] for device in devices)
    return {
        "memory_bytes": held,
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "load_average": os.getloadavg()[0],
    }


def calibrate_here(topology_name: str, cache: Path) -> dict[str, Any]:
    from clip_jax.planning.calibration import calibrate, save_calibration
    from clip_jax.planning.topology import open_topology

    calibration = calibrate(open_topology(topology_name))
    save_calibration(calibration, cache)
    return dataclasses.asdict(calibration) | {"text": calibration.describe()}


def _begin_to_count() -> int:
    """Bytes held now, with what compilation left given back; VmHWM counts from here."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    """Bytes, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def in_a_process(*arguments: str) -> dict[str, Any]:
    """The last line that this script prints with these arguments."""
    command = [sys.executable, __file__, "--only", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def only(arguments: list[str]) -> dict[str, Any]:
    """A process's part: calibrate TOPOLOGY CACHE | plan PLATFORM SIZE TOPOLOGY CACHE | run ..."""
    what, *rest = arguments
    if what == "calibrate":
        return calibrate_here(rest[0], Path(rest[1]))
    platform, name, topology = rest[:3]
    size = SIZES[platform][name]
    if what == "plan":
        return plan(platform, topology, size, Path(rest[3]))
    return run(platform, int(topology), size)


# ---- The table -----------------------------------------------------------------------------------


def measure(
    platform: str, name: str, topology: str, num_devices: int, cache: str
) -> dict[str, Any]:
    predicted = in_a_process("plan", platform, name, topology, cache)
    measured = in_a_process("run", platform, name, str(num_devices))
    row = {
        "size": name,
        "topology": topology,
        "predicted": predicted,
        "measured": measured,
        "memory_error": predicted["memory_bytes"] / measured["memory_bytes"] - 1,
        "time_error": predicted["seconds"][1] / measured["seconds"] - 1,
    }
    print(
        f"{name:>5} on {topology:6} memory {predicted['memory_bytes'] / 1e9:5.2f} GB, measured "
        f"{measured['memory_bytes'] / 1e9:5.2f} ({row['memory_error']:+.1%}); step "
        f"{predicted['seconds'][1]:6.3f} s, measured {measured['seconds']:6.3f} "
        f"({row['time_error']:+.1%})",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=SIZES, default="cpu")
    parser.add_argument("--topology", default="h200x1", help="of one GPU: what is here")
    parser.add_argument("--sizes", nargs="+")
    parser.add_argument("--try", dest="toy", action="store_true", help="the smallest on one device")
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(only(arguments.only)))
        return
    from environment import environment

    platform = arguments.platform
    names = arguments.sizes or list(SIZES[platform])
    names = names[:1] if arguments.toy else names
    topologies = [(arguments.topology, 1)]
    if platform == "cpu":
        topologies = [("cpu:1", 1)] if arguments.toy else [("cpu:1", 1), ("cpu:2", 2)]
    calibrations = {}
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for topology, num_devices in topologies:
            if platform == "cpu":
                calibrations[topology] = in_a_process("calibrate", topology, cache)
                print(f"{topology}: {calibrations[topology]['text']}", flush=True)
            rows += [measure(platform, name, topology, num_devices, cache) for name in names]
    if not arguments.toy and arguments.sizes is None:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        kept[platform] = {
            "environment": environment(),
            "calibrations": calibrations,
            "rows": rows,
        }
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    worst = max(abs(row["memory_error"]) for row in rows)
    assert worst <= MEMORY_GOAL[platform], f"memory is off by {worst:.1%}"
    worst = max(abs(row["time_error"]) for row in rows)
    assert worst <= TIME_GOAL, f"times are off by {worst:.1%}"


if __name__ == "__main__":
    main()
