"""XLA's attention against cuDNN's, forward and backward, for each shape that CLIP's towers have.

    python benchmarks/attention.py          # a GPU: some minutes
    python benchmarks/attention.py --try    # XLA's alone, tiny, on a CPU

The shapes are those of train_step.py on one GPU, in bfloat16: images and padded captions (causal),
and packed captions, whose mask cuDNN takes as a bias [B, 1, T, T], in training for even T alone:
rows of 78 tokens stand beside those of 77 to show what it would do. The two take turns, --repeats
times --steps each; medians count, and the ratio is that of the pairs of turns. Temporaries are the
compiled program's. An implementation that does not take a shape says why. `models/layers.py` takes
cuDNN's where it can; these figures say for which shapes it should not.
Merged by shape into benchmarks/results/attention_<device>.json.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent))

import jax
import jax.numpy as jnp
from environment import environment, merge_into
from train_step import GPU_BATCH, choose_packing, gpu_batch, make_batch, make_case

from clip_jax.models.attention import unfused_attention
from clip_jax.parallel.chips import chip_of

RESULTS = Path(__file__).parent / "results"
Implementation = Literal["xla", "cudnn"]
Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Shape:
    """Suffixes: B rows, T tokens, N heads, H head width."""

    name: str
    B: int
    T: int
    N: int
    H: int
    is_causal: bool = False
    segments: Any = None  # int32 [B, T], of packed captions


def shapes_of(model: str, batch: int) -> list[Shape]:
    """Of the towers, in training."""
    case = make_case(model, batch, "bfloat16", None, "gpu")
    image, text = case.model.image, case.model.text
    tokens = (image.image_size // image.patch_size) ** 2 + image.class_token
    of_text = text.num_heads, text.width // text.num_heads, True
    segments_PRT = make_batch(case, choose_packing(case))["segments"]
    packed_BT = jnp.asarray(segments_PRT.reshape(-1, text.context_length))
    even_BT = jnp.pad(packed_BT, ((0, 0), (0, text.context_length % 2)))
    return [
        Shape(f"{model} image", batch, tokens, image.num_heads, image.width // image.num_heads),
        Shape(f"{model} text, padded", batch, text.context_length, *of_text),
        Shape(f"{model} text, packed", *packed_BT.shape, *of_text, packed_BT),
        Shape(f"{model} text, packed, even", *even_BT.shape, *of_text, even_BT),
    ]


def make_run(shape: Shape, implementation: Implementation) -> tuple[Callable[[], Any], int]:
    """Forward and backward, as `models.layers.attention` has it; and its temporaries in bytes."""
    keys = jax.random.split(jax.random.key(0), 4)
    dims = shape.B, shape.T, shape.N, shape.H
    q_BTNH, k_BTNH, v_BTNH, out_BTNH = (jax.random.normal(key, dims, jnp.bfloat16) for key in keys)
    segments_BT, mask = shape.segments, None
    if segments_BT is not None:
        mask = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]

    def both_ways(q_BTNH: Array, k_BTNH: Array, v_BTNH: Array, out_BTNH: Array, mask: Any) -> Any:
        if implementation == "xla":
            mix = functools.partial(
                unfused_attention, is_causal=shape.is_causal, segments_BT=segments_BT
            )
        else:
            mix = functools.partial(
                jax.nn.dot_product_attention,
                mask=mask,
                is_causal=shape.is_causal,
                implementation="cudnn",
            )
        mixed_BTNH, backward = jax.vjp(mix, q_BTNH, k_BTNH, v_BTNH)
        return mixed_BTNH, backward(out_BTNH)

    arrays = q_BTNH, k_BTNH, v_BTNH, out_BTNH, mask
    compiled = jax.jit(both_ways).lower(*arrays).compile()
    return lambda: compiled(*arrays), compiled.memory_analysis().temp_size_in_bytes


def measure(
    shape: Shape, implementations: tuple[Implementation, ...], steps: int, repeats: int
) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for name in implementations:
        try:
            runs[name], temporaries = make_run(shape, name)
            jax.block_until_ready(runs[name]())
        except Exception as error:  # noqa: BLE001 - what it does not take is the result
            runs.pop(name, None)
            found[name] = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
        else:
            found[name] = {"temporary_bytes": temporaries, "seconds": []}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(steps):
                result = run()
            jax.block_until_ready(result)
            found[name]["seconds"].append((time.perf_counter() - start) / steps)
    for name in runs:
        found[name]["ms"] = 1e3 * statistics.median(found[name]["seconds"])
    shape_found = {key: getattr(shape, key) for key in ("B", "T", "N", "H", "is_causal")}
    if len(runs) == 2:
        turns = (found[name]["seconds"] for name in implementations)
        ratios = [xla / cudnn for xla, cudnn in zip(*turns, strict=True)]
        shape_found["cudnn_speedup"] = statistics.median(ratios)
        shape_found["cudnn_speedup_range"] = [min(ratios), max(ratios)]
    return shape_found | found


def show(name: str, found: dict[str, Any]) -> None:
    dims = " ".join(f"{key}={found[key]}" for key in "BTNH")
    print(f"{name:30} {dims}")
    for implementation in ("xla", "cudnn"):
        row = found.get(implementation, {})
        if "failed" in row:
            print(f"  {implementation:6} {row['failed']}")
        elif row:
            temporary = row["temporary_bytes"] / 1e9
            print(f"  {implementation:6} {row['ms']:9.3f} ms, temporaries {temporary:.2f} GB")
    if "cudnn_speedup" in found:
        least, most = found["cudnn_speedup_range"]
        print(f"  cuDNN's is {found['cudnn_speedup']:.2f}x as fast ({least:.2f} to {most:.2f})")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(GPU_BATCH), default=list(GPU_BATCH))
    parser.add_argument("--steps", type=int, help="of a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON, merged with what is there")
    parser.add_argument("--try", dest="toy", action="store_true", help="batches of 8")
    arguments = parser.parse_args()
    device = jax.local_devices()[0]
    implementations: tuple[Implementation, ...] = (
        ("xla", "cudnn") if device.platform == "gpu" else ("xla",)
    )
    steps = arguments.steps or (1 if arguments.toy else 20)
    output, chip = arguments.output, chip_of(device)
    if output is None and not arguments.toy:
        kind = device.device_kind.replace(" ", "_").lower()
        output = RESULTS / f"attention_{kind}.json"
    for model in arguments.models:
        memory = None if chip is None else chip.memory_bytes
        for shape in shapes_of(model, 8 if arguments.toy else gpu_batch(model, memory)):
            found = measure(shape, implementations, steps, arguments.repeats)
            show(shape.name, found)
            if output is not None:
                row = {"environment": environment(), **found}
                merge_into(output, "shapes", shape.name, row)


if __name__ == "__main__":
    main()
