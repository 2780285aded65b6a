"""Memory of the ring loss per device, from compiled programs, beside its minimum and open_clip.

    python benchmarks/loss_memory.py

Compiles loss and gradients ahead of time for B = 4k ... 1M pairs of width 512 over N = 1 ... 64
simulated CPU devices; nothing of that runs. The minimum is what any exact method that streams
must hold besides its arguments: gradients of both local embeddings, their embeddings, one
travelling block, the columns' statistics and one tile. open_clip's losses run for real on one
process at the sizes that fit: the bytes are those of the tensors that autograd saves.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parent))

import jax
from environment import environment
from jax.sharding import AxisType
from loss_flops import EMBED_DIM, compile_loss

from clip_jax.objectives.tiles import choose_tile_size

RESULTS = Path(__file__).parent / "results" / "loss_memory.json"
BATCHES = (4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144, 524_288, 1 << 20)
DEVICES = (1, 2, 4, 8, 16, 32, 64)
SMALLEST_SHARE, LARGEST_SHARE = 256, 1 << 20  # pairs per device


def minimum_bytes(rows: int, kind: str) -> dict[str, int]:
    """What a device must hold, in float32; see the head of this file."""
    block, tile = 4 * rows * EMBED_DIM, choose_tile_size(rows, EMBED_DIM)
    return {
        "embeddings": 2 * block,
        "gradients": 2 * block,
        "travelling_block": block,
        "statistics": 4 * rows * (3 + 2),  # of the columns; log-sum-exp of either side
        "tile": 4 * tile**2,
    }


def ring_row(kind: str, batch: int, num_devices: int) -> dict[str, Any]:
    mesh = jax.make_mesh(
        (num_devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_devices]
    )
    start = time.perf_counter()
    memory = compile_loss(mesh, ("data",), batch, {"kind": kind}).memory_analysis()
    rows = batch // num_devices
    parts = minimum_bytes(rows, kind)
    return {
        "kind": kind,
        "batch": batch,
        "devices": num_devices,
        "pairs_per_device": rows,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_and_output_bytes": memory.argument_size_in_bytes + memory.output_size_in_bytes,
        "minimum_bytes": sum(parts.values()),
        "minimum": parts,
        "over_minimum": memory.temp_size_in_bytes / sum(parts.values()),
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def open_clip_rows(largest_real: int) -> list[dict[str, Any]]:
    """Bytes that open_clip's losses save for the backward pass, one process, no gather."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None or importlib.util.find_spec("torch") is None:
        print("no open_clip rows: pip install --no-deps torch==2.13.0 open_clip_torch==3.3.0")
        return []
    import torch

    path = Path(spec.origin).parent / "loss.py"  # alone: the package needs torchvision
    loss_spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert loss_spec is not None
    assert loss_spec.loader is not None
    peer = importlib.util.module_from_spec(loss_spec)
    loss_spec.loader.exec_module(peer)
    rows = []
    for kind, module in (("softmax", peer.ClipLoss()), ("sigmoid", peer.SigLipLoss())):
        for batch in BATCHES[: BATCHES.index(65_536) + 1]:
            device = "cpu" if batch <= largest_real else "meta"  # meta: shapes alone
            saved: dict[int, int] = {}
            inputs = [
                torch.rand(batch, EMBED_DIM, device=device, requires_grad=True) for _ in range(2)
            ]
            inputs += [torch.ones((), device=device, requires_grad=True) for _ in range(2)]

            def remember(tensor: Any, saved: dict[int, int] = saved) -> Any:
                storage = tensor.untyped_storage()
                saved[storage._cdata] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
                loss = module(*inputs[: 3 if kind == "softmax" else 4])
            rows.append(
                {
                    "kind": kind,
                    "batch": batch,
                    "saved_bytes": sum(saved.values()),
                    "computed": device == "cpu",
                }
            )
            del loss, inputs
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--open-clip-largest",
        type=int,
        default=8192,
        help="largest batch that open_clip computes; it needs about 5 x 4 x batch^2 bytes",
    )
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    rows = []
    print(f"{'kind':<9}{'B':>9}{'N':>4}{'B/N':>9}{'temporaries':>13}{'minimum':>10}{'ratio':>7}")
    for batch in BATCHES:
        for num_devices in DEVICES:
            if SMALLEST_SHARE <= batch // num_devices <= LARGEST_SHARE:
                rows.append(ring_row("softmax", batch, num_devices))
                print_row(rows[-1])
    for batch, num_devices in ((32_768, 1), (32_768, 8), (1 << 20, 1), (1 << 20, 64)):
        rows.append(ring_row("sigmoid", batch, num_devices))
        print_row(rows[-1])
    flat = flatness(rows)
    print("largest / smallest temporaries over N = 4 ... 64 at one B/N:")
    print("  " + ", ".join(f"{share}: {spread:.3f}" for share, spread in flat.items()))
    peers = open_clip_rows(arguments.open_clip_largest)
    for peer in peers:
        same = (r for r in rows if r["kind"] == peer["kind"] and r["batch"] == peer["batch"])
        ring = next((r for r in same if r["devices"] == 1), None)
        peer["over_ring"] = peer["saved_bytes"] / ring["temporary_bytes"] if ring else None
        compared = f", {peer['over_ring']:.0f}x the ring's temporaries" if ring else ""
        how = "computed" if peer["computed"] else "from shapes"
        print(
            f"open_clip {peer['kind']:<9}{peer['batch']:>9}: {peer['saved_bytes'] / 1e6:,.0f} MB "
            f"saved ({how}){compared}"
        )
    RESULTS.write_text(
        json.dumps(
            {"environment": environment(), "rows": rows, "flatness": flat, "open_clip": peers},
            indent=1,
        )
        + "\n"
    )


def flatness(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Largest over smallest temporary bytes at each share, over the rings of 4 devices and more.

    1, 2 and 3 devices are other programs, which hold less: no block passes through.
    """
    spreads = {}
    for share in sorted({row["pairs_per_device"] for row in rows}):
        sizes = [
            row["temporary_bytes"]
            for row in rows
            if row["kind"] == "softmax" and row["pairs_per_device"] == share and row["devices"] >= 4
        ]
        if len(sizes) > 1:
            spreads[share] = max(sizes) / min(sizes)
    return spreads


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['kind']:<9}{row['batch']:>9}{row['devices']:>4}{row['pairs_per_device']:>9}"
        f"{row['temporary_bytes'] / 1e6:>10.1f} MB{row['minimum_bytes'] / 1e6:>7.0f} MB"
        f"{row['over_minimum']:>7.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
