"""The train step of a run, compiled for devices that need not be there."""

import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any

import jax
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from clip_jax.checkpoint import leaves_by_path
from clip_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    LoggingConfig,
    StabilityConfig,
    StartConfig,
    UserError,
    check_frozen,
    to_dict,
)
from clip_jax.models import Execution
from clip_jax.parallel import batch_sharding, make_mesh
from clip_jax.planning.assumed import assume
from clip_jax.planning.attention import fused_attention
from clip_jax.planning.compile_cache import CompileCache
from clip_jax.planning.compiler_errors import DoesNotFit, does_not_fit, one_line, sizes_too_large
from clip_jax.planning.hlo import Program
from clip_jax.planning.memory import Allocated, Memory, memory_of
from clip_jax.planning.topology import FRACTION, Platform, Topology, preallocated
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.schedule import make_schedule
from clip_jax.training.state import TrainState, abstract_state
from clip_jax.training.step import TrainStep, make_train_step

__all__ = ["ArrayInfo", "CompiledStep", "DoesNotFit", "compile_step"]

logger = logging.getLogger(__name__)

# There is no GPU to time kernels on, as autotuning and Triton's products would.
_CUDA_OPTIONS: dict[str, bool | int] = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayInfo:
    """One array of the state or the batch."""

    path: str  # "params/image/blocks/mlp/up/kernel"; of a batch "batch/image"
    shape: tuple[int, ...]
    dtype: str
    spec: str  # axes that split each dim: "(None, 'fsdp', ('data', 'fsdp'))"
    num_bytes: int  # of all of it
    device_bytes: int  # of one device's part


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """What a plan is made from: plain figures, and the program of one device."""

    config: ExperimentConfig  # with what was assumed: `assumptions` says so
    topology: str
    platform: Platform
    num_devices: int
    mesh: dict[str, int]  # axis to size, in order
    program: Program
    memory: Memory
    arrays: tuple[ArrayInfo, ...]
    analytic_flops: int  # of one sample, forward and backward, as MFU counts them
    least_flops: int  # of them those that training needs; what is recomputed does not count
    dtype: str  # of the towers' arithmetic
    attention: str  # that the run would use: "xla" or "cudnn"; compiled is always XLA's
    remat: str
    compile_seconds: float  # also where it is from the cache: what it took then
    cached: bool
    assumptions: tuple[str, ...] = ()


def compile_step(
    config: ExperimentConfig, topology: Topology, *, cache: Path | None, must_fit: bool = True
) -> CompiledStep:
    """The step that `clip-jax train` would run, compiled for `topology`.

    cache: folder of earlier results; None: none are kept. must_fit: raise DoesNotFit where a GPU's
    program needs more than there is; a TPU's compiler then gives no program, so it is raised all
    the same. Raises UserError in one line for what else a compiler refuses.
    """
    if topology.platform == "gpu" and config.num_slices is None and topology.num_slices > 1:
        # As GPUs that are there tell: hosts are slices.
        config = dataclasses.replace(config, num_slices=topology.num_slices)
    config, assumptions = assume(config, topology.num_devices)
    mesh = make_mesh(config, topology.devices)
    execution = Execution.for_backend(
        topology.platform, precision=config.precision, remat=config.remat, layers=config.layers
    )
    # cuDNN's kernels cannot be compiled ahead of time.
    compiled_execution = dataclasses.replace(execution, attention="xla")
    step = _Step(config, mesh, compiled_execution)
    entry, cached = _entry(config, mesh, topology, step, cache)
    if "needed_bytes" in entry:
        raise _too_large(topology, entry["needed_bytes"], entry["has_bytes"])
    program = Program(entry["text"], device_ids=[device.id for device in mesh.devices.flat])
    if execution.attention != compiled_execution.attention:
        assumptions += (
            "compiled with XLA's attention, as cuDNN's cannot be compiled ahead of time; memory "
            "and traffic of its scores are left out",
        )
    memory = memory_of(
        program,
        Allocated(**entry["allocated"]),
        attention_scores=fused_attention(program, config, execution).memory_bytes,
    )
    has = topology.usable_bytes
    if topology.platform == "gpu":
        assumptions += (f"JAX takes {preallocated():.0%} of a GPU's memory (${FRACTION})",)
    if must_fit and has is not None and memory.total > has:
        raise _too_large(topology, memory.total, has)
    return CompiledStep(
        config=config,
        topology=topology.name,
        platform=topology.platform,
        num_devices=topology.num_devices,
        mesh=dict(mesh.shape),
        program=program,
        memory=memory,
        arrays=tuple(step.arrays()),
        analytic_flops=step.task.flops(),
        least_flops=step.task.flops(least=True),
        dtype=str(execution.dtype),
        attention=execution.attention,
        remat=execution.remat,
        compile_seconds=entry["seconds"],
        cached=cached,
        assumptions=assumptions,
    )


class _Step:
    """A run's task, optimizer and step, made as `training.loop` does, and their shapes."""

    def __init__(self, config: ExperimentConfig, mesh: Mesh, execution: Execution) -> None:
        self.task = ContrastiveTask(config, mesh, execution=execution)
        ema = config.optimizer.ema_decay
        optimizer = make_optimizer(config, self.task.trainable, mesh=mesh)
        self.state: TrainState = abstract_state(self.task, optimizer, mesh, ema=ema is not None)
        check_frozen(config, leaves_by_path(self.state.params))
        self.function: TrainStep = make_train_step(
            self.task,
            optimizer,
            make_schedule(config),
            self.state,
            mesh,
            seed=config.seed,
            ema_decay=ema,
            with_layer_norms=config.logging.layer_norms,
        )
        self.batch = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh))
            for name, x in self.task.batch_spec().items()
        }

    def arrays(self) -> list[ArrayInfo]:
        leaves = leaves_by_path(self.state) | leaves_by_path({"batch": self.batch})
        return [_array(path, leaf) for path, leaf in leaves.items()]


def _array(path: str, leaf: Any) -> ArrayInfo:
    size = leaf.dtype.itemsize
    return ArrayInfo(
        path=path,
        shape=tuple(leaf.shape),
        dtype=str(leaf.dtype),
        spec=str(tuple(leaf.sharding.spec)),
        num_bytes=size * math.prod(leaf.shape),
        device_bytes=size * math.prod(leaf.sharding.shard_shape(leaf.shape)),
    )


def _entry(
    config: ExperimentConfig, mesh: Mesh, topology: Topology, step: _Step, folder: Path | None
) -> tuple[dict[str, Any], bool]:
    """What the cache keeps of a compilation, and whether it was there."""
    options = _options(config, topology.platform)
    cache = None if folder is None else CompileCache(folder)
    key = ""
    if cache is not None:
        content = {
            "config": to_dict(_what_matters(config, mesh)),
            "topology": topology.name,
            "options": options,
        }
        key = cache.key(content)
        if (entry := cache.load(key)) is not None:
            return entry, True
    entry = _compile(step, options, topology)
    if cache is not None:
        cache.save(key, entry)
    return entry, False


def _compile(step: _Step, options: dict[str, bool | int], topology: Topology) -> dict[str, Any]:
    """Lowers and compiles. Raises UserError where it is refused for another reason than memory."""
    started = time.monotonic()
    try:
        lowered = step.function.lower(step.state, step.batch)  # type: ignore[attr-defined]
        compiled = lowered.compile(compiler_options=options)
    except JaxRuntimeError as error:
        seconds = time.monotonic() - started
        if sizes := sizes_too_large(str(error)):
            needed, has = sizes
            return {"needed_bytes": needed, "has_bytes": has, "seconds": seconds}
        raise UserError(
            f"the compiler for {topology.name} refuses the step: {one_line(error)}"
        ) from None
    statistics = compiled.memory_analysis()
    allocated = Allocated(
        arguments=statistics.argument_size_in_bytes,
        temporaries=statistics.temp_size_in_bytes,
        outputs=statistics.output_size_in_bytes,
        aliased=statistics.alias_size_in_bytes,
        code=statistics.generated_code_size_in_bytes,
    )
    return {
        "text": compiled.as_text(),
        "allocated": allocated._asdict(),
        "seconds": time.monotonic() - started,
    }


def _options(config: ExperimentConfig, platform: Platform) -> dict[str, bool | int]:
    if platform != "gpu":
        return {}
    # As `parallel.backend.set_xla_flags` sets it.
    fixed = {"xla_gpu_exclude_nondeterministic_ops": True} if config.deterministic else {}
    return _CUDA_OPTIONS | fixed


def _what_matters(config: ExperimentConfig, mesh: Mesh) -> ExperimentConfig:
    """The config without what changes no figure of the program: names, paths, lengths."""
    return dataclasses.replace(
        config,
        name="",
        seed=0,
        num_steps=1,
        num_samples_seen=None,
        num_epochs=None,
        epoch_samples=None,
        heartbeat_seconds=0,
        mesh=tuple(mesh.devices.shape),
        start=StartConfig(lock=config.start.lock),
        data=DataConfig(packing=config.data.packing),
        stability=StabilityConfig(),
        evaluation=EvaluationConfig(),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(layer_norms=config.logging.layer_norms),
    )


def _too_large(topology: Topology, needed: int, has: int) -> DoesNotFit:
    share = (
        f" ({preallocated():.0%} of its own, as JAX takes)" if topology.platform == "gpu" else ""
    )
    chip = topology.chip
    device = topology.name if chip is None else chip.name
    return does_not_fit(device, needed_bytes=needed, has_bytes=has, share=share)
