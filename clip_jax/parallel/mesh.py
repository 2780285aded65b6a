"""The device mesh, and starting JAX on many hosts."""

import logging
import os

import jax
from jax.sharding import AxisType, Mesh

from clip_jax.config import ExperimentConfig, check_devices

logger = logging.getLogger(__name__)

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the batch is split over both

# Set by the launchers under which jax.distributed finds its coordinator by itself.
_CLUSTER_VARIABLES = ("SLURM_JOB_NUM_NODES", "OMPI_MCA_orte_hnp_uri", "JOBSET_NAME")
_TPU_WORKERS = "TPU_WORKER_HOSTNAMES"


def start_processes(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a run where a cluster is asked for or detected, else does nothing.

    coordinator: host:port of process 0. On CPUs the collectives go through gloo.
    """
    if coordinator is None and not _cluster_detected():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes, process_id)
    logger.info("process %d of %d", jax.process_index(), jax.process_count())


def _cluster_detected() -> bool:
    if int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1:
        return True
    if "," in os.environ.get(_TPU_WORKERS, ""):
        return True
    return any(os.environ.get(name) for name in _CLUSTER_VARIABLES[1:])


def make_mesh(config: ExperimentConfig) -> Mesh:
    """Mesh over all devices with axes (data, fsdp, tensor).

    Raises ConfigError where the device count does not fit `config.mesh` or the batch sizes.
    """
    sizes = check_devices(config, jax.device_count())
    # jax.make_mesh makes Explicit axes unless told otherwise.
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
