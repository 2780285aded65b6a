"""The device mesh, and starting JAX on many hosts."""

import logging
import os
import re

import jax
from jax.sharding import AxisType, Mesh

from clip_jax.config import ConfigError, ExperimentConfig, UserError, check_devices

logger = logging.getLogger(__name__)

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the batch is split over both

_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})")
_BY_HAND = "--coordinator=HOST:PORT --num_processes=N --process_id=I"


def start_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    distributed: bool = False,
) -> None:
    """Joins the processes of a run where a cluster is asked for or detected, else does nothing.

    coordinator: host:port of process 0; needs the two next ones. distributed: JAX finds all three
    by itself, whatever we detect. On CPUs the collectives go through gloo. Raises UserError where
    the arguments do not fit together, or JAX finds or reaches no cluster.
    """
    by_hand = _check_processes(coordinator, num_processes, process_id)
    if by_hand and distributed:
        raise UserError("--distributed finds the processes by itself: give it or --coordinator")
    if not (by_hand or distributed or _cluster_detected()):
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except Exception as error:
        remedy = "can all hosts reach it, and is its port free?" if by_hand else f"use {_BY_HAND}"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        where = f"the coordinator {coordinator}" if by_hand else "a cluster that JAX can detect"
        raise UserError(f"cannot join {where} ({reason}); {remedy}") from error
    logger.info("process %d of %d", jax.process_index(), jax.process_count())


def _check_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> bool:
    """Whether the processes are named by hand: all three are given."""
    if coordinator is None and num_processes is None and process_id is None:
        return False
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(f"give all three of {_BY_HAND}, or none")
    match = _HOST_AND_PORT.fullmatch(coordinator)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise UserError(f"--coordinator={coordinator} is not HOST:PORT, as in 10.0.0.1:1234")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} must be from 0 to --num_processes - 1 = {num_processes - 1}"
        )
    return True


def _cluster_detected() -> bool:
    """Whether a launcher that jax.distributed understands started this process among several.

    The shell of an sbatch or salloc has the variables of the job but none of a step: it is alone.
    """
    if "SLURM_STEP_NODELIST" in os.environ and "SLURM_PROCID" in os.environ:
        step = "SLURM_STEP_NUM_TASKS"
        if _environment_number(step if step in os.environ else "SLURM_NTASKS") > 1:
            return True
    if _environment_number("OMPI_COMM_WORLD_SIZE") > 1:  # Open MPI
        return True
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")  # TPU pods


def _environment_number(name: str) -> int:
    text = os.environ.get(name, "1")
    try:
        return int(text)
    except ValueError:
        raise UserError(f"${name} is {text!r}, not a number; unset it, or use {_BY_HAND}") from None


def check_rows_of_processes(mesh: Mesh) -> None:
    """Raises ConfigError where two processes would have to feed the same rows of a batch.

    Each process reads rows of its own, so the devices of a shard must belong to one process.
    """
    rows = mesh.devices.reshape(-1, mesh.devices.shape[-1])
    for devices in rows:
        processes = {device.process_index for device in devices}
        if len(processes) > 1:
            raise ConfigError(
                f"the tensor axis of mesh {tuple(mesh.devices.shape)} spans {len(processes)} "
                f"processes of {jax.local_device_count()} devices; it must lie within one: choose "
                "config.mesh with a tensor size that divides the devices of a process"
            )


def make_mesh(config: ExperimentConfig) -> Mesh:
    """Mesh over all devices with axes (data, fsdp, tensor).

    Raises ConfigError where the device count does not fit `config.mesh` or the batch sizes.
    """
    sizes = check_devices(config, jax.device_count())
    # jax.make_mesh makes Explicit axes unless told otherwise.
    mesh = jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    check_rows_of_processes(mesh)
    return mesh
