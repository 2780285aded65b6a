"""Where the FLOPs and bytes of a train step are, and what bounds each part on each chip.

    python benchmarks/roofline.py            # and then the tables of docs/performance.md
    python benchmarks/roofline.py --profile  # also times the parts of a step on this machine

FLOPs are those that MFU counts (`models.forward_flops`, three forward passes, which this script
checks against its own parts), and the loss. Bytes are the least that a step moves between memory
and chip if every product reads its factors and writes its result once, activations are bfloat16,
softmax and scores stay on the chip (fused attention), a nonlinearity is fused into the product
before it, a norm into the residual sum before it, and AdamW reads and writes float32 once. The
least time of a part is the longer of FLOPs / peak and bytes / bandwidth; parts run one after
another. Writes benchmarks/results/roofline.json.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import jax
import numpy as np
import performance_page
from environment import environment

from clip_jax.config import ImageTowerConfig, ModelConfig, TextTowerConfig, preset
from clip_jax.models import forward_flops
from clip_jax.parallel.chips import CHIPS, Chip
from clip_jax.parallel.host_memory import keep_freed_memory, use_one_arena

RESULTS = Path(__file__).parent / "results" / "roofline.json"
PRESETS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-SO400M-14-SigLIP")
CHIP_NAMES = ("H100 SXM", "H200", "TPU v5e", "TPU v5p")
SAMPLES = 256  # of a device: weights are read once for so many
GLOBAL_BATCH = 32_768
ADAMW_BYTES = 28  # a parameter: read it, its gradient and two moments; write all but the gradient
PROFILED, PROFILED_BATCH = "ViT-B-32", 16
Tower = ImageTowerConfig | TextTowerConfig


@dataclasses.dataclass(frozen=True)
class Part:
    """Of one sample, forward and backward."""

    name: str
    flops: float
    num_bytes: float

    @property
    def intensity(self) -> float:
        return self.flops / self.num_bytes

    @property
    def is_wide(self) -> bool:
        """Whether low precision could take it over: products with weights, in the blocks."""
        return self.name.endswith(("qkv and output products", "MLP products"))

    def seconds(self, chip: Chip, speedup: float = 1) -> float:
        """speedup: of products."""
        products = self.flops / _peak(chip) / speedup
        return max(products, self.num_bytes / chip.memory_bandwidth)

    def is_bound_by_memory(self, chip: Chip) -> bool:
        return self.intensity < _peak(chip) / chip.memory_bandwidth


def _peak(chip: Chip) -> float:
    return chip.peak_tflops["bfloat16"] * 1e12


# ---- Parts of a step -------------------------------------------------------------------------


def block_parts(prefix: str, tower: Tower, num_tokens: int) -> list[Part]:
    """Of all blocks of a tower. An "x" below is an array of tokens x width in bfloat16."""
    width, depth = tower.width, tower.depth
    hidden = round(width * tower.mlp_ratio)
    x, wide = 2 * num_tokens * width, 2 * num_tokens * hidden
    # Weights: bfloat16 read forward and backward, float32 gradients written, once for all samples.
    weights = 8 / SAMPLES
    return [
        Part(
            f"{prefix}: qkv and output products",
            depth * 3 * 8 * num_tokens * width**2,
            # Forward x -> 3x, x -> x; backward each result's gradient twice, each factor once.
            depth * ((4 + 2) * x + (8 + 4) * x + 4 * width**2 * weights),
        ),
        Part(
            f"{prefix}: scores and mixing, fused",
            depth * 3 * 4 * num_tokens**2 * width,
            # Forward q, k, v -> o; backward q, k, v, o and its gradient -> three gradients.
            depth * (4 + 8) * x,
        ),
        Part(
            f"{prefix}: MLP products",
            depth * 3 * 4 * num_tokens * width * hidden,
            # `up` also keeps its result from before the nonlinearity, which backward reads.
            depth * (6 * x + 8 * wide + 2 * width * hidden * weights),
        ),
        # Norm and residual sum twice: forward 4x each, backward 5x.
        Part(f"{prefix}: norms and residual sums", 0, depth * 18 * x),
    ]


def score_bytes(tower: Tower, num_tokens: int) -> float:
    """What attention that is not fused adds: bfloat16 arrays of heads x T x T, eleven passes."""
    return tower.depth * 11 * 2 * tower.num_heads * num_tokens**2


def parts_of(model: ModelConfig) -> list[Part]:
    image, text = model.image, model.text
    patches = (image.image_size // image.patch_size) ** 2
    pixels = 3 * image.image_size**2
    tokens = patches + image.class_token
    parts = [
        Part(
            "image: patch embedding",
            3 * 2 * patches * 3 * image.patch_size**2 * image.width,
            # uint8 in; patches in bfloat16 written, read by two products; the result, both ways.
            pixels + 3 * 2 * pixels + 2 * 2 * patches * image.width,
        ),
        *block_parts("image", image, tokens),
        *block_parts("text", text, text.context_length),
    ]
    image_flops, text_flops = forward_flops(model)
    rest = 3 * (image_flops + text_flops) - sum(part.flops for part in parts)
    # Projections, and the pooling of SigLIP: keys and values of all patches.
    pooled = 2 * 3 * (patches * image.width if image.pooling == "attention" else image.width)
    parts.append(Part("pooling and projections", rest, pooled + 24 * model.embed_dim))
    sigmoid = model.logit_bias_init is not None
    parts.append(
        # Tiles of 2,048 by 2,048 (objectives/tiles.py): a block is read once for each tile row.
        Part(
            "loss",
            (6 if sigmoid else 8) * GLOBAL_BATCH * model.embed_dim,
            8 * GLOBAL_BATCH * model.embed_dim * 4 / 2048,
        )
    )
    num_parameters = count_parameters(model)
    parts.append(Part("AdamW", 0, ADAMW_BYTES * num_parameters / SAMPLES))
    assert 0 <= rest < 0.06 * 3 * (image_flops + text_flops), (model.name, rest)
    return parts


def count_parameters(model: ModelConfig) -> int:
    from flax import nnx

    from clip_jax.models import CLIP

    made = jax.eval_shape(lambda key: CLIP(model, rngs=nnx.Rngs(key)), jax.random.key(0))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(made, nnx.Param)))


def summary(name: str, chips: list[Chip]) -> dict[str, Any]:
    model = preset(name)
    parts = parts_of(model)
    flops, num_bytes = (sum(getattr(p, key) for p in parts) for key in ("flops", "num_bytes"))
    tokens = (model.image.image_size // model.image.patch_size) ** 2 + model.image.class_token
    scores = score_bytes(model.image, tokens) + score_bytes(model.text, model.text.context_length)
    found: dict[str, Any] = {
        "parts": [dataclasses.asdict(part) for part in parts],
        "megabytes": num_bytes / 1e6,
        "scores_megabytes": scores / 1e6,
        "parameters": count_parameters(model),
        "wide_share": sum(part.flops for part in parts if part.is_wide) / flops,
        "chips": {},
    }
    for chip in chips:
        seconds = [part.seconds(chip) for part in parts]
        memory = sum(s for p, s in zip(parts, seconds, strict=True) if p.is_bound_by_memory(chip))
        unfused = sum(seconds) + scores / chip.memory_bandwidth
        doubled = sum(part.seconds(chip, speedup=2 if part.is_wide else 1) for part in parts)
        found["chips"][chip.name] = {
            "low_precision_speedup": sum(seconds) / doubled,
            "microseconds": 1e6 * sum(seconds),
            "samples_per_second": 1 / sum(seconds),
            "most_of_peak": flops / _peak(chip) / sum(seconds),
            "most_of_peak_unfused": flops / _peak(chip) / unfused,
            "share_bound_by_memory": memory / sum(seconds),
        }
    return found


# ---- The parts of a step, timed --------------------------------------------------------------


def profile(repeats: int = 3) -> dict[str, Any]:
    """Seconds of each part of a step of ViT-B/32 here, each compiled by itself, taking turns."""
    from train_step import Case, ours

    from clip_jax.objectives import contrastive_loss
    from clip_jax.training.throughput import measure_peak

    model, precision = preset(PROFILED), "float32"
    case = Case(PROFILED, model, PROFILED_BATCH, precision, None, jax.default_backend())
    runs: dict[str, Callable[[], Any]] = {}
    for packed in (False, True):
        run, _, _ = ours(case, packed=packed)
        runs[f"whole step, {'packed' if packed else 'padded'}"] = run
    runs |= tower_runs(model)
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(2, PROFILED_BATCH, model.embed_dim)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    loss = jax.jit(
        jax.grad(lambda i, t: contrastive_loss(i, t, 14.3, kind="softmax")[0], argnums=(0, 1))
    )
    runs["loss"] = lambda: loss(*unit)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    keep_freed_memory()
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "model": PROFILED,
        "batch": PROFILED_BATCH,
        "seconds": medians,
        "ceiling_tflops": measure_peak(precision),
        "flops_per_sample": dict(zip(("image", "text"), forward_flops(model), strict=True)),
    }


def tower_runs(model: ModelConfig) -> dict[str, Callable[[], Any]]:
    """Each tower forward and backward, and AdamW on all parameters."""
    import optax
    from flax import nnx
    from train_step import make_captions, padded

    from clip_jax.models import CLIP

    clip = CLIP(model, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(clip)
    size, rng = model.image.image_size, np.random.default_rng(0)
    shape = (PROFILED_BATCH, size, size, 3)
    image = {"image": jax.numpy.asarray(rng.integers(0, 256, shape, np.uint8))}
    captions = make_captions(model, PROFILED_BATCH)
    text = {"tokens": jax.numpy.asarray(padded(captions, model.text.context_length))}

    def of_image(params: Any) -> Any:
        return (nnx.merge(graphdef, params).encode_image(image) ** 3).sum()

    def of_text(params: Any) -> Any:
        return (nnx.merge(graphdef, params).encode_text(text) ** 3).sum()

    both = jax.jit(jax.grad(of_image)), jax.jit(jax.grad(of_text))
    adamw = optax.adamw(1e-4)
    state = adamw.init(params)

    @jax.jit
    def update(params: Any, state: Any) -> Any:
        updates, state = adamw.update(params, state, params)
        return optax.apply_updates(params, updates), state

    return {
        "image tower": lambda: both[0](params),
        "text tower, padded": lambda: both[1](params),
        "AdamW": lambda: update(params, state),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="time the parts here: three minutes")
    arguments = parser.parse_args()
    use_one_arena()  # as `clip-jax train` does
    chips = [chip for chip in CHIPS if chip.name in CHIP_NAMES]
    result: dict[str, Any] = {"environment": environment(), "samples_of_a_device": SAMPLES}
    result["chips"] = {
        chip.name: {"flops": _peak(chip), "bandwidth": chip.memory_bandwidth} for chip in chips
    }
    result["presets"] = {name: summary(name, chips) for name in PRESETS}
    earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if arguments.profile:
        result["profile"] = {"environment": environment(), **profile()}
    elif "profile" in earlier:
        result["profile"] = earlier["profile"]
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    performance_page.main()


if __name__ == "__main__":
    main()
