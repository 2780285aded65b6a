"""What the step of train_step.py would cost on an H100, read from the program compiled for it.

    python benchmarks/train_step_aot.py --target_config=FILE   # jax-cuda13-plugin, jax-cuda13-pjrt

The programs that train_step.py times on a GPU, at its batches, in bfloat16 without remat, padded
and packed, compiled ahead of time for one H100; nothing runs. Attention is XLA's, as cuDNN's cannot
be compiled so: its arrays of B x heads x T x T are counted apart, since cuDNN makes none. FLOPs
against the analytic count; the share of products with float32 operands (the loss and the
projections alone); memory against the chip's. Writes benchmarks/results/train_step_aot.json.
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
# There is no GPU to time kernels on, as autotuning and Triton's products would.
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"

import jax
from caption_lengths import LENGTH, WEB_WORDS, web_lengths
from environment import environment
from jax.experimental import topologies

from clip_jax.config import (
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    PackingConfig,
    SourceConfig,
    preset,
)
from clip_jax.data.packing import choose_rows
from clip_jax.models import Execution
from clip_jax.parallel import batch_sharding, make_mesh
from clip_jax.parallel.chips import chip_of
from clip_jax.planning import Program
from clip_jax.planning.hlo import operands, product_flops
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.schedule import make_schedule
from clip_jax.training.state import abstract_state
from clip_jax.training.step import make_train_step

RESULTS = Path(__file__).parent / "results" / "train_step_aot.json"
BATCH = {"ViT-B-32": 2048, "ViT-B-16": 512, "ViT-L-14": 192}
GROUP_SIZE = 64


def flops_by_dtype(program: Program) -> Counter[str]:
    """Of products, by the dtype of their operands."""
    found: Counter[str] = Counter()
    for instruction, computation, times in program.instructions():
        if flops := product_flops(instruction, computation):
            dtype = computation[operands(instruction)[0]].shapes[0][0]
            found[dtype] += times * flops
    return found


def measure(name: str, packed: bool, device: Any) -> dict[str, Any]:
    model, batch = preset(name), BATCH[name]
    packing = PackingConfig()
    if packed:
        lengths = web_lengths(WEB_WORDS["DataComp-1B"])(2**14, 0)
        packing = PackingConfig(
            group_size=GROUP_SIZE, rows=choose_rows(lengths, GROUP_SIZE, LENGTH)
        )
    config = ExperimentConfig(
        model=model,
        global_batch_size=batch,
        data=DataConfig(sources={"none": SourceConfig(path="none")}, packing=packing),
        evaluation=EvaluationConfig(batch_size=batch),
    )
    mesh = make_mesh(config, [device])
    execution = dataclasses.replace(
        Execution.for_backend("gpu", precision="bfloat16"), attention="xla"
    )
    task = ContrastiveTask(config, mesh, execution=execution)
    optimizer = make_optimizer(config, task.trainable, mesh=mesh)
    abstract = abstract_state(task, optimizer, mesh)
    step = make_train_step(task, optimizer, make_schedule(config), abstract, mesh, seed=0)
    inputs = {
        key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh))
        for key, x in task.batch_spec().items()
    }
    start = time.perf_counter()
    compiled = step.lower(abstract, inputs).compile()
    seconds = time.perf_counter() - start
    program, memory = Program(compiled.as_text()), compiled.memory_analysis()
    by_dtype = flops_by_dtype(program)
    chip = chip_of(device)
    assert chip is not None
    image, text = model.image, model.text
    tokens = (image.image_size // image.patch_size) ** 2 + image.class_token
    # Scores of a layer, bfloat16, which its backward pass keeps.
    rows = batch * packing.rows // packing.group_size if packing.group_size else batch
    scores = 2 * (
        image.depth * batch * image.num_heads * tokens**2
        + text.depth * rows * text.num_heads * text.context_length**2
    )
    total = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    return {
        "model": name,
        "batch": batch,
        "packed_rows": packing.rows if packed else None,
        "tflops": program.flops / 1e12,
        "flops_over_analytic": program.flops / (batch * task.flops()),
        "float32_share_of_flops": by_dtype["f32"] / program.flops,
        "state_and_batch_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "attention_scores_gb": scores / 1e9,
        "fits_without_scores": total - scores < chip.memory_bytes,
        "least_ms_at_peak": 1e3 * program.flops / (chip.peak_tflops["bfloat16"] * 1e12),
        "largest_array_elements": program.largest_array,
        "compile_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target_config", type=Path, required=True, help="describes the GPU")
    parser.add_argument("--models", nargs="+", choices=list(BATCH), default=list(BATCH))
    arguments = parser.parse_args()
    topology = topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=arguments.target_config.read_text()
    )
    rows = []
    for name in arguments.models:
        for packed in (False, True):
            row = measure(name, packed, topology.devices[0])
            rows.append(row)
            print(
                f"{name:9} {'packed' if packed else 'padded'}: {row['tflops']:7.1f} TFLOPs, "
                f"{row['flops_over_analytic']:.3f} x analytic, float32 "
                f"{row['float32_share_of_flops']:.2%}; temporaries {row['temporary_gb']:.1f} GB, "
                f"of attention {row['attention_scores_gb']:.1f}; {row['compile_seconds']} s",
                flush=True,
            )
    if set(arguments.models) == set(BATCH):
        result = {"environment": environment(), "rows": rows}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
