"""The device mesh: which device computes which part of a batch and of the weights."""

import logging
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from clip_jax.config import ConfigError, ExperimentConfig, check_devices

logger = logging.getLogger(__name__)

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the batch is split over both


def make_mesh(config: ExperimentConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over all devices, or those given, with axes (data, fsdp, tensor).

    Raises ConfigError where the devices do not fit `config.mesh`, `config.num_slices` or the batch
    sizes.
    """
    grid = device_grid(config, jax.devices() if devices is None else devices)
    mesh = Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    check_rows_of_processes(mesh)
    return mesh


def device_grid(config: ExperimentConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in the shape of the mesh.

    Devices of a slice have a fast network among them (a TPU slice's ICI, a GPU host's NVLink), and
    slices a slow one. The data axis goes across the slices, then fsdp, tensor never; inside a slice
    the axes follow its torus. Raises ConfigError as `make_mesh`.
    """
    sizes = check_devices(config, len(devices))
    slices = split_slices(config, devices)
    across = axes_across_slices(config, sizes, len(slices))
    inside = tuple(size // outer for size, outer in zip(sizes, across, strict=True))
    blocks = np.empty(len(slices), object)
    for i, members in enumerate(slices):
        blocks[i] = _arranged(inside, members)
    if len(slices) == 1:
        return np.asarray(blocks[0])
    logger.info("%d slices: mesh %s is %s across and %s inside", len(slices), sizes, across, inside)
    # Slices are the outer part of each axis that crosses them.
    return np.block(blocks.reshape(across).tolist())


def split_slices(config: ExperimentConfig, devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices by slice, in order.

    As the devices tell (TPU slices; hosts of GPUs), else `config.num_slices` equal parts in the
    order of their processes. Raises ConfigError where the two differ or the parts are unequal.
    """
    told: dict[int, list[jax.Device]] = {}
    for device in devices:
        told.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    wanted = config.num_slices
    if len(told) == 1 and wanted is not None and devices[0].platform != "tpu":
        if len(devices) % wanted:
            raise ConfigError(
                f"config.num_slices {wanted} does not divide the {len(devices)} devices"
            )
        size = len(devices) // wanted
        return [list(devices[i * size : (i + 1) * size]) for i in range(wanted)]
    if wanted not in (None, len(told)):
        raise ConfigError(
            f"config.num_slices is {wanted}, but the devices are of {len(told)} slices; leave it "
            "out, or start the run on as many"
        )
    counts = {index: len(members) for index, members in sorted(told.items())}
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"slices of different sizes make no mesh: {counts} devices by slice; start the run on "
            "equal ones"
        )
    return [told[index] for index in counts]


def axes_across_slices(
    config: ExperimentConfig, sizes: tuple[int, int, int], num_slices: int
) -> tuple[int, int, int]:
    """How many slices each axis crosses: data as many as it can, then fsdp, tensor none.

    Raises ConfigError where data x fsdp cannot take them all.
    """
    data, fsdp, _ = sizes
    over_data = math.gcd(data, num_slices)
    over_fsdp = num_slices // over_data
    if fsdp % over_fsdp:
        raise ConfigError(
            f"config.mesh {config.mesh} = {sizes} does not lie on {num_slices} slices: its data "
            f"axis must be a multiple of {num_slices}, or data x fsdp be one, since tensor never "
            f"crosses slices; as in config.mesh=({num_slices}, -1, {sizes[2]})"
        )
    return over_data, over_fsdp, 1


def _arranged(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """The devices of a slice in this shape, neighbours along an axis near on its network."""
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        pass  # no axis of the torus, nor several whole ones, has this size
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except NotImplementedError as error:
        logger.warning(
            "mesh %s does not follow the network of the devices (%s): they are taken in order",
            *(shape, " ".join(str(error).split())[:200]),
        )
    return np.array(devices).reshape(shape)


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
                f"processes of {mesh.devices.size // _num_processes(mesh)} devices; it must lie "
                "within one: choose config.mesh with a tensor size that divides the devices of a "
                "process"
            )


def _num_processes(mesh: Mesh) -> int:
    return len({device.process_index for device in mesh.devices.flat})
