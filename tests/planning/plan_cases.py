"""Steps and topologies made by hand: what a compiler would say, by a formula of the setting."""

import dataclasses
import math
from typing import Any

from small import small_config, small_model

from clip_jax.config import (
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    PackingConfig,
    SourceConfig,
    TokenizerConfig,
)
from clip_jax.parallel.chips import CHIPS
from clip_jax.planning import Program
from clip_jax.planning.compiler_errors import DoesNotFit
from clip_jax.planning.compiling import ArrayInfo, CompiledStep
from clip_jax.planning.estimate import Estimate, Range, Traffic
from clip_jax.planning.memory import Memory
from clip_jax.planning.plan_setting import StateBytes
from clip_jax.planning.plan_trials import Trials
from clip_jax.planning.topology import Topology

MIB = 2**20
# One product of 8 x 16 by 16 x 4: 1,024 FLOPs.
PROGRAM = """
ENTRY %main (a: bf16[8,16], b: bf16[16,4]) -> f32[8,4] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,4]{1,0} parameter(1)
  ROOT %dot = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def chip_named(name: str) -> Any:
    return next(chip for chip in CHIPS if chip.name == name)


def topology_of(
    num_devices: int = 16, *, chip: str = "TPU v5e", memory: int | None = 100 * MIB
) -> Topology:
    """Hosts of four. memory: of a device."""
    platform: Any = "cpu" if memory is None else "tpu" if chip.startswith("TPU") else "gpu"
    return Topology(
        name="made:by-hand",
        platform=platform,
        devices=tuple(range(num_devices)),
        chip=None if memory is None else chip_named(chip),
        num_hosts=max(1, num_devices // 4),
        num_slices=1,
        memory_bytes=memory,
    )


def config_of(**changes: Any) -> ExperimentConfig:
    """512 pairs a batch; 4 heads, so that tensor has a choice."""
    model = small_model()
    model = dataclasses.replace(
        model,
        image=dataclasses.replace(model.image, num_heads=4),
        text=dataclasses.replace(model.text, num_heads=4),
    )
    data = DataConfig(
        sources={"pairs": SourceConfig(path="pairs.tar")},
        packing=PackingConfig(group_size=0),
        tokenizer=TokenizerConfig(kind="file", path="tokenizer.json"),
    )
    config = small_config(
        model=model,
        data=data,
        global_batch_size=512,
        evaluation=EvaluationConfig(batch_size=512),
        precision="bfloat16",
    )
    return dataclasses.replace(config, **changes)


def states(mesh: tuple[int, int, int]) -> StateBytes:
    """10 MiB of parameters and twice as much of the optimizer, split by fsdp and tensor."""
    parts = mesh[1] * mesh[2]
    return StateBytes(10 * MIB // parts, 20 * MIB // parts)


KEPT = {"none": 1.0, "dots": 0.6, "offload": 0.25, "full": 0.2}


def needed_bytes(config: ExperimentConfig, activations: int) -> int:
    """State, gradients, and what a policy keeps of the activations of a microbatch."""
    data, fsdp, tensor = config.mesh
    state = states((data, fsdp, tensor))
    towers = 1 if config.microbatches == 1 else 0.6  # one after the other
    kept = KEPT[config.remat] * activations * towers / config.microbatches / tensor
    return state.total + state.parameters + round(kept)


def step_of(
    config: ExperimentConfig, *, total: int = 50 * MIB, program: str = PROGRAM, **changes: Any
) -> CompiledStep:
    mesh = dict(zip(("data", "fsdp", "tensor"), config.mesh, strict=True))
    step = CompiledStep(
        config=config,
        topology="made:by-hand",
        platform="tpu",
        num_devices=math.prod(config.mesh),
        mesh=mesh,
        program=Program(program),
        memory=Memory(
            parameters=10 * MIB,
            optimizer=20 * MIB,
            model_state=0,
            batch=MIB,
            activations=total - 32 * MIB,
            temporaries=MIB,
            output=0,
            total=total,
        ),
        arrays=(
            ArrayInfo(
                path="params/image/blocks/mlp/up/kernel",
                shape=(2, 32, 128),
                dtype="float32",
                spec="(None, 'fsdp', None)",
                num_bytes=32768,
                device_bytes=32768 // mesh["fsdp"],
            ),
        ),
        analytic_flops=16,
        least_flops=16,
        dtype="bfloat16",
        attention="xla",
        remat=config.remat,
        compile_seconds=1.5,
        cached=False,
        assumptions=("made by hand",),
    )
    return dataclasses.replace(step, **changes)


class Compiler:
    """Compiles by `needed_bytes`; counts, and refuses like a TPU's what does not fit."""

    def __init__(self, activations: int, memory: int | None = 100 * MIB) -> None:
        self.activations, self.memory = activations, memory
        self.compiled: list[ExperimentConfig] = []
        self.fails: set[str] = set()  # remat policies at which the compiler breaks

    def __call__(self, config: ExperimentConfig) -> CompiledStep:
        self.compiled.append(config)
        if config.remat in self.fails:
            raise RuntimeError("INTERNAL: broken <b>")
        needed = needed_bytes(config, self.activations)
        if self.memory is not None and needed > self.memory:
            raise DoesNotFit(
                f"the step needs {needed} bytes", needed_bytes=needed, has_bytes=self.memory
            )
        return step_of(config, total=needed)


def trials_of(compiler: Compiler, config: ExperimentConfig, limit: int = 100) -> Trials:
    return Trials(
        config,
        memory_bytes=compiler.memory,
        compile=compiler,
        state_bytes=states,
        limit=limit,
    )


def estimate_of(step: CompiledStep, **changes: Any) -> Estimate:
    """Slower with what is computed again and with tensor."""
    slower = {"none": 1.0, "dots": 1.1, "offload": 1.2, "full": 1.4}[step.remat]
    seconds = 0.1 * slower * (1.3 if step.config.microbatches > 1 else 1) * step.mesh["tensor"]
    rate = step.config.global_batch_size / seconds
    estimate = Estimate(
        flops=1024,
        flops_by_dtype={"bf16": 1024},
        compute_seconds=0.05,
        memory_bytes=10**9,
        memory_seconds=0.06,
        host_bytes=0,
        host_seconds=0.0,
        chip_seconds=0.08,
        traffic=(
            Traffic(
                kind="all-gather",
                axes=("fsdp",),
                num_bytes=5 * 10**8,
                times=24,
                link="ICI",
                seconds=0.01,
                asynchronous=0.5,
            ),
        ),
        communication_seconds=0.01,
        step_seconds=Range(0.9 * seconds, seconds, 1.2 * seconds),
        bound_by="compute",
        mfu=Range(0.55, 0.5, 0.4),
        samples_per_second=Range(rate / 0.9, rate, rate / 1.2),
        num_steps=10,
        days=Range(0.9, 1.0, 1.2),
        chip_hours=Range(345.6, 384.0, 460.8),
        cost=None,
        assumptions=("made by hand", "no input stalls"),
        measured=None,
    )
    return dataclasses.replace(estimate, **changes)
