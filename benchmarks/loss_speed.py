"""Time of loss and gradients: the ring on one device, the dense loss, and open_clip's.

    python benchmarks/loss_speed.py            # CPU: sizes that all of them can run
    python benchmarks/loss_speed.py --large    # GPU or TPU: also a million pairs, and the
                                               # loss's share of a ViT-B/32 training step

Each contender is timed in turn, several times over, and its best time counts: other work on the
machine slows a contender, and never speeds it up.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import jax
import jax.numpy as jnp
import numpy as np
from environment import environment

from clip_jax.objectives import (
    contrastive_loss,
    dense_sigmoid_contrastive_loss,
    dense_softmax_contrastive_loss,
)

RESULTS = Path(__file__).parent / "results"
DENSE = {"softmax": dense_softmax_contrastive_loss, "sigmoid": dense_sigmoid_contrastive_loss}
SCALE, BIAS = 10.0, -10.0


def best_seconds(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The shortest of `repeats` interleaved runs of each; the first, with compilation, is not."""
    best = dict.fromkeys(contenders, float("inf"))
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def embeddings(batch: int, width: int) -> tuple[jax.Array, jax.Array]:
    def unit(key: jax.Array) -> jax.Array:
        x_BE = jax.random.normal(key, (batch, width))
        return x_BE / jnp.linalg.norm(x_BE, axis=1, keepdims=True)

    image_key, text_key = jax.random.split(jax.random.key(0))
    return jax.jit(unit)(image_key), jax.jit(unit)(text_key)


def gradient_of(loss: Callable[..., Any]) -> Any:
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))


def ring(kind: str, **options: Any) -> Any:
    return gradient_of(lambda *inputs: contrastive_loss(*inputs, kind=kind, **options))


def open_clip_module(kind: str) -> Any:
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None or importlib.util.find_spec("torch") is None:
        return None
    # loss.py alone: the package itself needs torchvision.
    path = Path(spec.origin).parent / "loss.py"
    loss_spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert loss_spec is not None
    assert loss_spec.loader is not None
    peer = importlib.util.module_from_spec(loss_spec)
    loss_spec.loader.exec_module(peer)
    return peer.ClipLoss() if kind == "softmax" else peer.SigLipLoss()


def open_clip(kind: str, image: jax.Array, text: jax.Array) -> Callable[[], None] | None:
    module = open_clip_module(kind)
    if module is None:
        return None
    import torch

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    inputs = [torch.tensor(np.asarray(x), device=device, requires_grad=True) for x in (image, text)]
    inputs += [torch.tensor(x, device=device, requires_grad=True) for x in (SCALE, BIAS)]

    def run() -> None:
        for x in inputs:
            x.grad = None
        module(*inputs[: 3 if kind == "softmax" else 4]).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def compare(batch: int, width: int, kind: str, repeats: int) -> dict[str, Any]:
    image, text = embeddings(batch, width)
    ring_step = ring(kind)
    # The dense loss's metrics cost it a second gradient: it is spared them.
    dense_step = jax.jit(
        jax.value_and_grad(lambda *inputs: DENSE[kind](*inputs)[0], argnums=(0, 1, 2, 3))
    )
    contenders: dict[str, Callable[[], Any]] = {
        "ring": lambda: jax.block_until_ready(ring_step(image, text, SCALE, BIAS)),
        "dense": lambda: jax.block_until_ready(dense_step(image, text, SCALE, BIAS)),
    }
    if (peer := open_clip(kind, image, text)) is not None:
        contenders["open_clip"] = peer
    seconds = best_seconds(contenders, repeats)
    return {"kind": kind, "batch": batch, "width": width, "seconds": seconds}


def product_ceiling(size: int, repeats: int) -> float:
    """Measured FLOP/s of a square bfloat16 product with float32 sums."""
    left = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    seconds = best_seconds({"product": lambda: product(left, left).block_until_ready()}, repeats)
    return 2 * size**3 / seconds["product"]


def large(batch: int, width: int, product_size: int) -> dict[str, Any]:
    """One device alone with a batch far beyond any B x B array."""
    image, text = embeddings(batch, width)
    ceiling = product_ceiling(product_size, 5)
    result: dict[str, Any] = {"batch": batch, "width": width, "product_flops_per_second": ceiling}
    for kind, products in (("softmax", 8), ("sigmoid", 6)):
        step = ring(kind, product_dtype=jnp.bfloat16)
        memory = step.lower(image, text, SCALE, BIAS).compile().memory_analysis()
        seconds = best_seconds(
            {"ring": lambda step=step: jax.block_until_ready(step(image, text, SCALE, BIAS))}, 2
        )["ring"]
        speed = products * batch**2 * width / seconds
        result[kind] = {
            "seconds": seconds,
            "flops_per_second": speed,
            "share_of_ceiling": speed / ceiling,
            "temporary_bytes": memory.temp_size_in_bytes,
        }
        print(
            f"{kind} B = {batch:,}: {seconds:.2f} s, {speed / 1e12:.1f} TFLOP/s, "
            f"{100 * speed / ceiling:.0f}% of the measured product ceiling, "
            f"{memory.temp_size_in_bytes / 1e9:.2f} GB of temporaries"
        )
    return result


def share_of_step(batch: int, microbatches: int, preset_name: str) -> dict[str, Any]:
    """The loss's share of a training step's loss and gradients on one device."""
    from jax.sharding import AxisType

    from clip_jax.config import ExperimentConfig, LossConfig, preset
    from clip_jax.parallel import MESH_AXES
    from clip_jax.tasks import ContrastiveTask

    config = ExperimentConfig(
        model=preset(preset_name),
        global_batch_size=batch,
        microbatches=microbatches,
        loss=LossConfig(product_dtype="bfloat16"),
    )
    mesh = jax.make_mesh(
        (1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )
    task = ContrastiveTask(config, mesh)
    params, _ = jax.jit(task.init)(jax.random.key(0))
    inputs = {name: jnp.zeros(x.shape, x.dtype) for name, x in task.batch_spec().items()}
    tokens = inputs["tokens"].at[:, -1].set(config.model.text.eot_id)
    inputs["tokens"] = tokens.at[:, 0].set(jnp.arange(batch) % config.model.text.eot_id)

    @jax.jit
    def step(params: Any, inputs: Any) -> Any:
        def loss(p: Any) -> Any:
            return task.loss(p, {}, inputs, rng=jax.random.key(0), step=jnp.int32(0))[0]

        return jax.value_and_grad(loss)(params)

    image, text = embeddings(batch, config.model.embed_dim)
    loss_alone = ring("softmax", product_dtype=jnp.bfloat16)
    seconds = best_seconds(
        {
            "step": lambda: jax.block_until_ready(step(params, inputs)),
            "loss": lambda: jax.block_until_ready(loss_alone(image, text, SCALE, BIAS)),
        },
        2,
    )
    share = seconds["loss"] / seconds["step"]
    print(
        f"{preset_name} batch {batch:,}: step {seconds['step']:.3f} s, "
        f"loss {seconds['loss']:.4f} s = {100 * share:.2f}%"
    )
    return {"model": preset_name, "batch": batch, "seconds": seconds, "share": share}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--large-batch", type=int, default=1 << 20)
    parser.add_argument("--product-size", type=int, default=8192)
    parser.add_argument("--step-batch", type=int, default=32_768)
    parser.add_argument("--step-microbatches", type=int, default=32)
    parser.add_argument("--step-model", default="ViT-B-32")
    arguments = parser.parse_args()
    platform = jax.default_backend()
    if open_clip_module("softmax") is None:
        print("no open_clip times: pip install --no-deps torch==2.13.0 open_clip_torch==3.3.0")
    rows = []
    for batch in arguments.batches:
        for kind in ("softmax", "sigmoid"):
            rows.append(compare(batch, arguments.width, kind, arguments.repeats))
            times = ", ".join(f"{n} {1e3 * s:.0f} ms" for n, s in rows[-1]["seconds"].items())
            print(f"{kind:<8} B = {batch:>6}: {times}", flush=True)
    result: dict[str, Any] = {"rows": rows}
    if arguments.large:
        result["large"] = large(arguments.large_batch, arguments.width, arguments.product_size)
        result["step"] = share_of_step(
            arguments.step_batch, arguments.step_microbatches, arguments.step_model
        )
    result = {"environment": environment(), **result}
    (RESULTS / f"loss_speed_{platform}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
