"""One of two real processes: the ring over gloo and, where it is installed, open_clip's losses.

python two_processes.py RANK PORT TORCH_PORT OUTPUT.npz
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from objectives.oracle import open_clip_losses, random_pairs

SCALE, BIAS, BATCH, EMBED_DIM = 12.0, -4.0, 40, 16
KINDS = ("softmax", "sigmoid")


def ring(rank: int) -> dict[str, np.ndarray]:
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from clip_jax.objectives import contrastive_loss

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    pairs = random_pairs(BATCH, EMBED_DIM)
    here = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    sharding = NamedSharding(mesh, rows)
    image, text = (
        jax.make_array_from_process_local_data(sharding, np.float32(pairs[name][here]))
        for name in ("image", "text")
    )
    results = {}
    for kind in KINDS:
        sharded = jax.shard_map(
            lambda *inputs, kind=kind: contrastive_loss(
                *inputs, kind=kind, axis_names="data", tile_size=8
            )[0],
            mesh=mesh,
            in_specs=(rows, rows, whole, whole),
            out_specs=whole,
        )
        loss, gradients = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1, 2, 3)))(
            image, text, np.float32(SCALE), np.float32(BIAS)
        )
        results[f"{kind}_loss"] = np.asarray(loss.addressable_data(0))
        for name, gradient in zip(("image", "text", "scale", "bias"), gradients, strict=True):
            results[f"{kind}_{name}"] = np.asarray(gradient.addressable_data(0))
    return results


def open_clip(rank: int, port: int) -> dict[str, np.ndarray]:
    peer = open_clip_losses()
    if peer is None:
        return {}
    import torch
    from torch import distributed

    distributed.init_process_group(
        "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2
    )
    pairs = random_pairs(BATCH, EMBED_DIM)
    here = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    losses = {
        "softmax": peer.ClipLoss(
            local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=2
        ),
        "sigmoid": peer.SigLipLoss(rank=rank, world_size=2),
    }
    results = {}
    for kind, module in losses.items():
        inputs = [torch.tensor(pairs[n][here], requires_grad=True) for n in ("image", "text")]
        inputs += [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (SCALE, BIAS)]
        loss = module(*inputs[: 3 if kind == "softmax" else 4])
        loss.backward()
        # What data-parallel training does: the mean over processes of loss and gradients.
        for tensor in (loss, inputs[2].grad, inputs[3].grad):
            if tensor is not None:
                distributed.all_reduce(tensor.data)
                tensor.data /= 2
        results[f"open_clip_{kind}_loss"] = loss.detach().numpy()
        for name, x in zip(("image", "text", "scale", "bias"), inputs, strict=True):
            if x.grad is not None:
                split = 2 if name in ("image", "text") else 1
                results[f"open_clip_{kind}_{name}"] = x.grad.numpy() / split
    return results


def main() -> None:
    rank, port, torch_port = (int(x) for x in sys.argv[1:4])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    results = ring(rank) | open_clip(rank, torch_port)
    np.savez(sys.argv[4], **results)


if __name__ == "__main__":
    main()
