"""What a train step sends between devices, read from programs compiled for hardware not at hand.

    python benchmarks/collectives.py tpu [--mesh 1,16,1]        # needs jax[tpu]
    python benchmarks/collectives.py cuda --target_config=FILE  # jax-cuda13-plugin, jax-cuda13-pjrt

ViT-B/16 CLIP on v5e:4x4 and on eight H100s, with XLA's attention (cuDNN's cannot be compiled ahead
of time). Nothing runs. Traffic over the fsdp axis is compared with the analytic minimum: weights
gathered going forward and backward, gradients reduce-scattered, (n - 1) / n of their bytes each, in
the dtype in which the program uses them. Rows of the batch (136 a device) are a number that no
weight has, so a collective that moves activations gives itself away.
"""

import argparse
import dataclasses
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # compiling for a TPU that is not there
# There is no GPU to time kernels on, as autotuning and Triton's products would.
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"

import jax
from environment import environment
from jax.experimental import topologies

from clip_jax.config import PRESETS, ExperimentConfig
from clip_jax.models import Execution
from clip_jax.parallel import batch_sharding, make_mesh
from clip_jax.planning import Collective, Program
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer, make_schedule
from clip_jax.training.state import abstract_state
from clip_jax.training.step import make_train_step

RESULTS = Path(__file__).parent / "results" / "collectives.json"
ROWS_PER_DEVICE = 136
LIMIT = 1.1
# (mesh, remat): the TPU has 16 GB, and an H100 80.
TARGETS: dict[str, tuple[tuple[tuple[int, int, int], str], ...]] = {
    "tpu": (((1, 16, 1), "dots"), ((2, 8, 1), "dots"), ((4, 2, 2), "dots")),
    "cuda": (((1, 8, 1), "none"), ((1, 8, 1), "dots"), ((2, 4, 1), "none"), ((2, 2, 2), "none")),
}


def devices_of(target: str, target_config: Path | None) -> list[Any]:
    if target == "tpu":
        return list(topologies.get_topology_desc("v5e:4x4", platform="tpu").devices)
    assert target_config is not None, "a GPU is described by --target_config"
    topology = topologies.get_topology_desc(
        platform="cuda", topology="1x1x8", target_config=target_config.read_text()
    )
    return list(topology.devices)


def least_fsdp_bytes(abstract: Any, dtype: Any, fsdp: int) -> int:
    """Sent by a device: three times what it lacks of the weights that fsdp splits."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "fsdp" not in leaf.sharding.spec:
            continue
        in_tower = name.startswith("image/") or "/blocks/" in name
        used = jax.numpy.dtype(dtype if in_tower and name.endswith("kernel") else "float32")
        shard = leaf.sharding.shard_shape(leaf.shape)
        elements = fsdp
        for size in shard:
            elements *= size
        total += 3 * elements * used.itemsize * (fsdp - 1) // fsdp
    return total


def moves_activations(collective: Collective) -> bool:
    has_rows = any(
        size and size % ROWS_PER_DEVICE == 0 for _, dims in collective.shapes for size in dims
    )
    return has_rows and not _is_loss(collective)


def _is_loss(collective: Collective) -> bool:
    return "shard_map/" in collective.op_name and (
        "ppermute" in collective.op_name or "psum" in collective.op_name
    )


def measure(
    target: str, devices: list[Any], shape: tuple[int, int, int], remat: str
) -> dict[str, Any]:
    model = PRESETS["ViT-B-16"]
    config = ExperimentConfig(
        model=model,
        mesh=shape,
        remat=remat,  # type: ignore[arg-type]
        global_batch_size=ROWS_PER_DEVICE * shape[0] * shape[1],
    )
    config = dataclasses.replace(
        config,
        evaluation=dataclasses.replace(config.evaluation, batch_size=config.global_batch_size),
    )
    mesh = make_mesh(config, devices)
    execution = Execution.for_backend(
        "gpu" if target == "cuda" else target, precision=config.precision, remat=remat
    )
    execution = dataclasses.replace(execution, attention="xla")
    task, optimizer = ContrastiveTask(config, mesh, execution=execution), make_optimizer(config)
    abstract = abstract_state(task, optimizer, mesh)
    step = make_train_step(task, optimizer, make_schedule(config), abstract, mesh, seed=0)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh))
        for name, x in task.batch_spec().items()
    }
    start = time.perf_counter()
    compiled = step.lower(abstract, batch).compile()
    seconds = time.perf_counter() - start
    program = Program(compiled.as_text())
    sent: Counter[str] = Counter()
    for collective in program.collectives:
        axes = "+".join(collective.axes(mesh.shape)) or "none"
        what = "loss" if _is_loss(collective) else collective.kind
        sent[f"{what} over {axes}"] += collective.sent_bytes
    over_fsdp = sum(
        c.sent_bytes
        for c in program.collectives
        if c.axes(mesh.shape) == ("fsdp",) and not _is_loss(c)
    )
    least = least_fsdp_bytes(abstract.params, execution.dtype, shape[1])
    moved = [
        f"{c.kind} over {'+'.join(c.axes(mesh.shape))} of {c.shapes}: {c.op_name}"
        for c in program.collectives
        if moves_activations(c) and c.kind in ("all-gather", "all-to-all")
    ]
    return {
        "target": target,
        "mesh": list(shape),
        "remat": remat,
        "global_batch_size": config.global_batch_size,
        "sent_bytes": dict(sent.most_common()),
        "fsdp_bytes": over_fsdp,
        "least_fsdp_bytes": least,
        "fsdp_over_least": over_fsdp / least,
        "activations_gathered_or_exchanged": moved,
        "flops_over_analytic": program.flops
        * mesh.size
        / (task.flops(least=True) * config.global_batch_size),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--target_config", type=Path, help="text proto that describes the GPU")
    parser.add_argument("--mesh", help="of the rows to measure; the others stay as they are")
    arguments = parser.parse_args()
    devices = devices_of(arguments.target, arguments.target_config)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    by_key = {
        (row["target"], *row["mesh"], row["remat"]): row
        for row in results["rows"]
        if (tuple(row["mesh"]), row["remat"]) in TARGETS[row["target"]]
    }
    measured = []
    for shape, remat in TARGETS[arguments.target]:
        if arguments.mesh not in (None, ",".join(map(str, shape))):
            continue
        row = measure(arguments.target, devices, shape, remat)
        measured.append(row)
        by_key[arguments.target, *shape, remat] = row
        print(
            f"{row['target']:<5} mesh {shape!s:<11} remat {remat:<5} fsdp "
            f"{row['fsdp_bytes'] / 1e6:8.1f} MB = {row['fsdp_over_least']:.3f} x least, FLOPs "
            f"{row['flops_over_analytic']:.3f} x analytic, temporaries "
            f"{row['temporary_bytes'] / 2**30:.1f} GiB, {row['compile_seconds']} s"
        )
        for what, num_bytes in row["sent_bytes"].items():
            print(f"        {what:<36}{num_bytes / 1e6:10.2f} MB")
        for line in row["activations_gathered_or_exchanged"]:
            print(f"        activations: {line}")
        RESULTS.write_text(
            json.dumps({"environment": environment(), "rows": list(by_key.values())}, indent=1)
            + "\n"
        )
    for row in measured:
        assert row["fsdp_over_least"] <= LIMIT, row
        assert not row["activations_gathered_or_exchanged"], row


if __name__ == "__main__":
    main()
