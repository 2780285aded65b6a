"""Checkpoints: how long a save stops the run, what it needs of the host, how fast it restores.

    python benchmarks/checkpoint.py

A state of --gigabytes GB, sharded over 8 simulated devices (or over the accelerators there are,
with --platform=gpu), goes through a jitted step that donates it, as a train step does. Each
contestant runs in a process of its own: --saves saves with some steps after each, in the background
or not; medians, the first save left out. Blocking is the time until `save` returns. What the next
step takes longer than others is told apart: on CPUs the arrays that are being written are not
donated but copied, and the writing takes cores from the step. Memory is the highest resident size
over that before the first save. The restores follow in fresh processes, on the same mesh and on
another, with checksums and without.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

RESULTS = Path(__file__).parent / "results" / "checkpoint.json"
ARRAYS = 24
STEPS_BETWEEN = 4


def start(platform: str) -> Any:
    os.environ["JAX_PLATFORMS"] = "cpu" if platform == "cpu" else ""
    import jax

    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", 8)
    return jax


def abstract_state(gigabytes: float, mesh_shape: tuple[int, int]) -> Any:
    """As many arrays as fill `gigabytes`, and some small ones, over the second axis of the mesh."""
    import collections

    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh(mesh_shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    columns = int(gigabytes * 1e9 / 4 / ARRAYS / 1024) // 64 * 64

    def leaf(shape: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    state = collections.namedtuple("State", ["params", "small"])
    return state(
        {f"kernel_{i}": leaf((1024, columns), None, "fsdp") for i in range(ARRAYS)},
        {f"scale_{i}": leaf((64,)) for i in range(100)},
    )


def memory(field: str) -> int:
    """'VmRSS' or, the highest so far, 'VmHWM', in bytes."""
    with Path("/proc/self/status").open() as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def run_saves(arguments: argparse.Namespace) -> dict[str, Any]:
    jax = start(arguments.platform)
    import jax.numpy as jnp

    from clip_jax.checkpoint import CheckpointStore
    from clip_jax.config import CheckpointConfig

    abstract = abstract_state(arguments.gigabytes, (1, jax.device_count()))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def init(key: Any) -> Any:
        leaves, structure = jax.tree.flatten(abstract)
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(
            structure, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        )

    def step(state: Any) -> Any:
        """Touches all of the state and computes for a while, as a step does."""
        work = jax.lax.fori_loop(
            0, arguments.work, lambda _, x: jnp.tanh(x @ x), jnp.full((512, 512), 1e-3)
        )
        return jax.tree.map(lambda x: x * 0.999 + work[0, 0] * 1e-6, state)

    state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    step = jax.jit(step, donate_argnums=0)

    def timed() -> float:
        nonlocal state
        begin = time.perf_counter()
        state = jax.block_until_ready(step(state))
        return time.perf_counter() - begin

    timed()
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    steps = [timed() for _ in range(8)]
    usual = statistics.median(steps)
    resident = memory("VmRSS")
    config = CheckpointConfig(keep_latest=1, asynchronous=arguments.run == "async")
    store = CheckpointStore(arguments.folder, config)
    saves, after, during, totals = [], [], [], []
    for number in range(1, arguments.saves + 1):
        begin = time.perf_counter()
        store.save(number, state, {"samples_seen": number})
        saves.append(time.perf_counter() - begin)
        after.append(timed())
        during += [timed() for _ in range(STEPS_BETWEEN)]
        store.wait()
        totals.append(time.perf_counter() - begin)
        for _ in range(STEPS_BETWEEN):
            timed()
    store.close()
    return {
        "state_bytes": num_bytes,
        "step_seconds": usual,
        "save_seconds": statistics.median(saves[1:]),
        "first_save_seconds": saves[0],
        "next_step_seconds": statistics.median(after[1:]),
        "steps_while_writing_seconds": statistics.median(during),
        "total_seconds": statistics.median(totals[1:]),
        "resident_bytes": resident,
        "peak_bytes": memory("VmHWM") - resident,
    }


def run_restore(arguments: argparse.Namespace) -> dict[str, Any]:
    jax = start(arguments.platform)
    from clip_jax.checkpoint import CheckpointStore
    from clip_jax.config import CheckpointConfig

    devices = jax.device_count()
    shape = (1, devices) if arguments.mesh == "same" else (2, devices // 2)
    abstract = abstract_state(arguments.gigabytes, shape if devices > 1 else (1, 1))
    store = CheckpointStore(arguments.folder, CheckpointConfig(verify=arguments.verify))
    resident, begin = memory("VmRSS"), time.perf_counter()
    state = jax.block_until_ready(store.restore_latest(abstract)[1])
    seconds = time.perf_counter() - begin
    # What all devices of this host hold: on CPUs that is host memory too.
    held = sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards)
    peak = memory("VmHWM") - resident
    store.close()
    return {"seconds": seconds, "held_bytes": held, "peak_bytes": peak}


def checksum_rate() -> float:
    """GB/s of one core."""
    data = os.urandom(64 * 2**20)
    best = 0.0
    for _ in range(5):
        begin = time.process_time()
        zlib.crc32(data)
        best = max(best, len(data) / 1e9 / (time.process_time() - begin))
    return best


def child(arguments: argparse.Namespace, run: str, folder: str, *flags: str) -> dict[str, Any]:
    command = [sys.executable, __file__, f"--run={run}", f"--folder={folder}", *flags]
    for name in ("gigabytes", "saves", "work", "platform"):
        command.append(f"--{name}={getattr(arguments, name)}")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr[-3000:])
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.2, help="of the state")
    parser.add_argument("--saves", type=int, default=5, help="the first warms up")
    parser.add_argument("--work", type=int, default=100, help="matrix products of a step")
    parser.add_argument("--platform", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--disk", help="folder to write to (default: a temporary one)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--run", choices=("async", "sync", "restore"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mesh", default="same", help=argparse.SUPPRESS)
    parser.add_argument("--verify", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        run = run_restore if arguments.run == "restore" else run_saves
        print(json.dumps(run(arguments)))
        return

    with tempfile.TemporaryDirectory(dir=arguments.disk) as folder:
        background = child(arguments, "async", f"{folder}/async")
        blocking = child(arguments, "sync", f"{folder}/sync")
        restores = {
            f"{mesh} mesh{'' if verify else ', no checksums'}": child(
                arguments, "restore", f"{folder}/async", f"--mesh={mesh}", f"--verify={verify}"
            )
            for mesh, verify in (("same", 1), ("other", 1), ("same", 0))
        }
    late = background["next_step_seconds"] - background["step_seconds"]
    size = background["state_bytes"]
    start(arguments.platform)
    from environment import environment

    result = {
        "environment": environment(),
        "state_gb": size / 1e9,
        "blocking_share": background["save_seconds"] / blocking["save_seconds"],
        "next_step_share": late / blocking["save_seconds"],
        "asynchronous": background,
        "synchronous": blocking,
        "peak_memory_over_state": {
            "asynchronous": background["peak_bytes"] / size,
            "synchronous": blocking["peak_bytes"] / size,
        },
        "restore": restores,
        "checksum_gb_per_second": checksum_rate(),
    }
    print(json.dumps(result["environment"], indent=2))
    print(f"state {size / 1e9:.2f} GB; step {background['step_seconds']:.3f} s")
    print(f"synchronous save {blocking['save_seconds']:.3f} s")
    print(
        f"asynchronous: save {background['save_seconds']:.3f} s, "
        f"{100 * result['blocking_share']:.1f}% of it; the next step {late:+.3f} s"
    )
    print(f"memory over the state: {background['peak_bytes'] / size:.2f} x its size")
    for name, restore in restores.items():
        print(
            f"restore on the {name}: {restore['seconds']:.2f} s, "
            f"{size / 1e9 / restore['seconds']:.2f} GB/s, peak "
            f"{restore['peak_bytes'] / restore['held_bytes']:.2f} x what the devices hold"
        )
    print(f"checksums {result['checksum_gb_per_second']:.1f} GB/s of one core")
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
