"""Starting JAX on the processes of a run, wherever a launcher has put them."""

import dataclasses
import importlib.util
import logging
import os
import re
from typing import Any

import jax

from clip_jax.config import UserError

logger = logging.getLogger(__name__)

_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})")
_BY_HAND = "--coordinator=HOST:PORT --num_processes=N --process_id=I"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """This process among those of a run; what is None, JAX finds by itself."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_process_id: int | None = None  # among those of this host, where each has one GPU
    method: str | None = None  # JAX's name of how to find the rest


def start_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    distributed: bool = False,
    heartbeat_seconds: int = 100,
) -> None:
    """Joins the processes of a run where a cluster is asked for or detected, else does nothing.

    coordinator: host:port of process 0; needs the two next ones. distributed: JAX finds all three
    by itself, whatever we detect. heartbeat_seconds: after so many without a sign of a process,
    the others end. On CPUs the collectives go through gloo. Raises UserError where the arguments
    do not fit together, or JAX finds or reaches no cluster.
    """
    by_hand = _check_processes(coordinator, num_processes, process_id)
    if by_hand and distributed:
        raise UserError("--distributed finds the processes by itself: give it or --coordinator")
    if by_hand:
        place = _Place(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    else:
        found = _Place() if distributed else _detected()
        if found is None:
            return
        place = found
    options: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat_seconds}
    if place.local_process_id is not None:
        options["local_device_ids"] = [place.local_process_id]
    if place.method is not None:
        options["cluster_detection_method"] = place.method
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            place.coordinator, place.num_processes, place.process_id, **options
        )
    except Exception as error:
        known = place.coordinator is not None
        remedy = "can all hosts reach it, and is its port free?" if known else f"use {_BY_HAND}"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        where = f"the coordinator {place.coordinator}" if known else "a cluster that JAX can detect"
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


def _detected() -> _Place | None:
    """Where a launcher started this process among several; None where it is alone.

    The shell of an sbatch or salloc has the variables of the job but none of a step: it is alone.
    """
    if "SLURM_STEP_NODELIST" in os.environ and "SLURM_PROCID" in os.environ:
        step = "SLURM_STEP_NUM_TASKS"
        if _number(step if step in os.environ else "SLURM_NTASKS") > 1:
            return _Place()
    for found in (_mpi(), _by_environment()):
        if found is not None:
            return found
    # TPU pods: the hosts of a slice, and slices of one host each.
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES", ""))
    if "," in hosts or (hosts and _number("MEGASCALE_NUM_SLICES") > 1):
        return _Place()
    return None


def _mpi() -> _Place | None:
    """Open MPI, or MPICH and its kin, which name rank and size and nothing to meet at."""
    open_mpi = _number("OMPI_COMM_WORLD_SIZE") > 1
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    if not open_mpi:
        names = ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID")
        if _number("PMI_SIZE") <= 1:
            return None
    coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator is not None:
        size, rank, local = names
        return _Place(
            coordinator=coordinator,
            num_processes=_number(size),
            process_id=_number(rank),
            local_process_id=_number(local) if local in os.environ else None,
        )
    if open_mpi and "OMPI_MCA_orte_hnp_uri" in os.environ:  # before version 5: JAX reads it
        return _Place()
    if importlib.util.find_spec("mpi4py") is not None:
        return _Place(method="mpi4py")
    raise UserError(
        f"MPI started {_number(names[0])} processes that have nowhere to meet: set "
        "JAX_COORDINATOR_ADDRESS=HOST:PORT of the first one for all of them, or install mpi4py"
    )


def _by_environment() -> _Place | None:
    """JAX_COORDINATOR_ADDRESS and beside it what a Kubernetes JobSet, or a person, has set."""
    coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator is None or _number("JAX_NUM_PROCESSES") <= 1:
        return None
    rank = "JAX_PROCESS_ID" if "JAX_PROCESS_ID" in os.environ else "JOB_COMPLETION_INDEX"
    if rank not in os.environ:
        raise UserError(
            f"$JAX_COORDINATOR_ADDRESS={coordinator} needs $JAX_PROCESS_ID too (in a Kubernetes "
            "job completionMode: Indexed, which sets $JOB_COMPLETION_INDEX)"
        )
    return _Place(
        coordinator=coordinator,
        num_processes=_number("JAX_NUM_PROCESSES"),
        process_id=_number(rank),
    )


def _number(name: str) -> int:
    text = os.environ.get(name, "1")
    try:
        return int(text)
    except ValueError:
        raise UserError(f"${name} is {text!r}, not a number; unset it, or use {_BY_HAND}") from None
