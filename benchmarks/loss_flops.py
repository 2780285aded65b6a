"""FLOPs and traffic of the ring loss, read from compiled programs.

    python benchmarks/loss_flops.py

Compiles loss and gradients ahead of time for simulated CPU devices and, where `jax[tpu]` is
installed (an environment of its own will do: it needs nothing else), for a TPU v5e:4x4. Nothing
runs. Counts are checked against 8 B^2 E and the ring's least traffic:
N - 1 hops of the text block forward and backward, N hops of its gradient.
"""

import argparse
import importlib.util
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # compiling for a TPU that is not there

import jax
import jax.numpy as jnp
from environment import environment
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clip_jax.objectives import contrastive_loss
from clip_jax.planning import Program

RESULTS = Path(__file__).parent / "results" / "loss_flops.json"
EMBED_DIM = 512


def compile_loss(
    mesh: Mesh, axis_names: tuple[str, ...], batch: int, options: dict[str, Any]
) -> Any:
    """The compiled loss, metrics and gradients for [batch, EMBED_DIM] embeddings."""
    rows = PartitionSpec(axis_names)

    def loss(image: Any, text: Any, scale: Any, bias: Any) -> Any:
        return jax.shard_map(
            lambda *inputs: contrastive_loss(*inputs, axis_names=axis_names, **options),
            mesh=mesh,
            in_specs=(rows, rows, PartitionSpec(), PartitionSpec()),
            out_specs=PartitionSpec(),
        )(image, text, scale, bias)

    def shape(*dims: int) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, rows if dims else PartitionSpec())
        return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=sharding)

    embeddings = shape(batch, EMBED_DIM)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    return step.lower(embeddings, embeddings, shape(), shape()).compile()


def measure(
    target: str, mesh: Mesh, axis_names: tuple[str, ...], local_batch: int, options: dict[str, Any]
) -> dict[str, Any]:
    """One row of the table."""
    num_devices = mesh.size
    batch = num_devices * local_batch
    start = time.perf_counter()
    compiled = compile_loss(mesh, axis_names, batch, options)
    program = Program(compiled.as_text())
    hidden, permutes = program.overlapped_permutes()
    block = local_batch * EMBED_DIM
    travelling = jnp.dtype(options.get("product_dtype", jnp.float32)).itemsize
    one_round = options["kind"] == "sigmoid"
    text_rounds = 1 if one_round else 2
    least = block * (text_rounds * (num_devices - 1) * travelling + num_devices * 4)
    products = (6 if one_round else 8) * batch**2 * EMBED_DIM
    moved = sum(c.sent_bytes for c in program.collectives)
    largest = max((c.num_elements for c in program.collectives), default=0)
    calls: Counter[str] = Counter()
    for collective in program.collectives:
        calls[collective.kind] += collective.times
    return {
        "target": target,
        "mesh": list(mesh.devices.shape),
        "options": {k: getattr(v, "__name__", v) for k, v in options.items()},
        "local_batch": local_batch,
        "flops": program.flops * num_devices,
        "flops_over_8BBE": program.flops * num_devices / (8 * batch**2 * EMBED_DIM),
        "flops_over_needed": program.flops * num_devices / products,
        "bytes_per_device": moved,
        "bytes_over_least": moved / least if num_devices > 1 else None,
        "collectives": dict(calls),
        "largest_collective_over_block": largest / block,
        "largest_array_over_block": program.largest_array / block,
        "block_permutes_hidden": [hidden, permutes],
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def cpu_rows() -> list[dict[str, Any]]:
    rows = []
    for shape, axes in (((1,), ("data",)), ((8,), ("data",)), ((4, 2), ("data", "fsdp"))):
        for kind in ("softmax", "sigmoid"):
            devices = jax.devices()[: jnp.prod(jnp.array(shape)).item()]
            mesh = jax.make_mesh(
                shape, axes, axis_types=(AxisType.Auto,) * len(shape), devices=devices
            )
            rows.append(measure("cpu", mesh, axes, 4096, {"kind": kind}))
    rows.append(measure("cpu", mesh, axes, 4096, {"kind": "softmax", "bidirectional": True}))
    return rows


def tpu_rows(topology: str, local_batch: int) -> list[dict[str, Any]]:
    from jax.experimental import mesh_utils, topologies

    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    grid = mesh_utils.create_device_mesh((4, 4), devices)
    mesh = Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    variants: tuple[dict[str, Any], ...] = (
        {"kind": "softmax"},
        {"kind": "softmax", "product_dtype": jnp.bfloat16},
        {"kind": "softmax", "product_dtype": jnp.bfloat16, "bidirectional": True},
        {"kind": "sigmoid", "product_dtype": jnp.bfloat16},
    )
    return [
        measure(f"tpu {topology}", mesh, ("data", "fsdp"), local_batch, options)
        for options in variants
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:4x4", help="TPU to compile for")
    parser.add_argument("--local-batch", type=int, default=4096, help="pairs per TPU chip")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    rows = cpu_rows()
    if importlib.util.find_spec("libtpu"):
        rows += tpu_rows(arguments.topology, arguments.local_batch)
    else:
        print('no TPU rows: pip install "jax[tpu]" (in an environment of its own if you like)')
    columns = ("flops_over_8BBE", "bytes_over_least", "largest_collective_over_block")
    print(f"{'target':<14}{'mesh':<9}{'options':<62}" + "".join(f"{c:>31}" for c in columns))
    for row in rows:
        figures = "".join(
            f"{'-' if row[c] is None else format(row[c], '.3f'):>31}" for c in columns
        )
        print(f"{row['target']:<14}{row['mesh']!s:<9}{row['options']!s:<62}{figures}")
        print(f"{'':<23}{row['collectives']}, hidden {row['block_permutes_hidden']}")
    for row in rows:
        assert row["flops_over_8BBE"] <= 1.05, row
        assert row["bytes_over_least"] is None or row["bytes_over_least"] <= 1.05, row
        assert row["largest_collective_over_block"] <= 1, row
    RESULTS.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
