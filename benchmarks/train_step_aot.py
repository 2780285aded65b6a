"""What the step of train_step.py would cost on an H100, read from the program compiled for it.

    python benchmarks/train_step_aot.py              # takes the extra `plan-cuda`; no GPU
    python benchmarks/train_step_aot.py --try        # a layer a tower, one model

The programs that train_step.py times on that GPU, at its batches, in bfloat16 without remat, padded
and packed, compiled ahead of time for one device; nothing runs. Attention is XLA's, as cuDNN's
cannot be compiled so: the arrays of B x heads x T x T that cuDNN would not make are counted apart,
of images and padded text; packed text has XLA's attention in any case. FLOPs against the analytic
count; the share of products with float32 operands (the loss, the projections, positions of packed
text); memory against what JAX takes of the GPU's. Merged by program, after each, into
benchmarks/results/train_step_aot.json.
"""

import argparse
import dataclasses
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

# There is no GPU to time kernels on, as autotuning and Triton's products would.
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"

import jax
from environment import environment, merge_into
from train_step import GPU_BATCH, Case, choose_packing, gpu_batch, make_case, make_config

from clip_jax.config import PackingConfig
from clip_jax.models import Execution
from clip_jax.parallel import batch_sharding, make_mesh
from clip_jax.planning import Program
from clip_jax.planning.hlo import operands, product_flops
from clip_jax.planning.topology import Topology, open_topology
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.schedule import make_schedule
from clip_jax.training.state import abstract_state
from clip_jax.training.step import make_train_step

RESULTS = Path(__file__).parent / "results" / "train_step_aot.json"
TOPOLOGY = "h100x1"


def flops_by_dtype(program: Program) -> Counter[str]:
    """Of products, by the dtype of their operands."""
    found: Counter[str] = Counter()
    for instruction, computation, times in program.instructions():
        if flops := product_flops(instruction, computation):
            dtype = computation[operands(instruction)[0]].shapes[0][0]
            found[dtype] += times * flops
    return found


def measure(case: Case, packing: PackingConfig, topology: Topology) -> dict[str, Any]:
    config, batch = make_config(case, packing), case.batch
    mesh = make_mesh(config, topology.devices)
    execution = dataclasses.replace(
        Execution.for_backend("gpu", precision=case.precision), attention="xla"
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
    assert topology.chip is not None
    assert topology.usable_bytes is not None
    peak = topology.chip.peak_tflops[case.precision]
    image, text = case.model.image, case.model.text
    tokens = (image.image_size // image.patch_size) ** 2 + image.class_token
    # bfloat16, of all layers: the backward pass reads them.
    scores = 2 * batch * image.depth * image.num_heads * tokens**2
    if not packing.group_size:
        scores += 2 * batch * text.depth * text.num_heads * text.context_length**2
    total = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    return {
        "model": case.name,
        "batch": batch,
        "packed_rows": packing.rows if packing.group_size else None,
        "tflops": program.flops / 1e12,
        "flops_over_analytic": program.flops / (batch * task.flops(least=True)),
        "float32_share_of_flops": by_dtype["f32"] / program.flops,
        "state_and_batch_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "attention_scores_gb": scores / 1e9,
        "usable_gb": topology.usable_bytes / 1e9,
        "fits_without_scores": total - scores < topology.usable_bytes,
        "least_ms_at_peak": 1e3 * program.flops / (peak * 1e12),
        "largest_array_elements": program.largest_array,
        "compile_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(GPU_BATCH), default=list(GPU_BATCH))
    parser.add_argument("--output", type=Path, help="JSON, merged with what is there")
    parser.add_argument("--try", dest="toy", action="store_true", help="compiles a toy, padded")
    arguments = parser.parse_args()
    topology = open_topology(TOPOLOGY)
    output = arguments.output or (None if arguments.toy else RESULTS)
    for name in arguments.models[:1] if arguments.toy else arguments.models:
        batch = 8 if arguments.toy else gpu_batch(name, topology.memory_bytes)
        layers = (1, 1) if arguments.toy else None
        case = make_case(name, batch, "bfloat16", layers, "gpu")
        kinds = {"padded": PackingConfig()}
        if not arguments.toy:
            kinds["packed"] = choose_packing(case)
        for kind, packing in kinds.items():
            row = measure(case, packing, topology)
            if output is not None:
                found = {"environment": environment(), "topology": TOPOLOGY, **row}
                merge_into(output, "programs", f"{name}, {kind}", found)
            print(
                f"{name:9} {kind}, batch {batch}: {row['tflops']:7.1f} TFLOPs, "
                f"{row['flops_over_analytic']:.3f} x analytic, float32 "
                f"{row['float32_share_of_flops']:.2%}; temporaries {row['temporary_gb']:.1f} GB, "
                f"of attention {row['attention_scores_gb']:.1f}; {row['compile_seconds']} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
