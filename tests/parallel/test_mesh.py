import dataclasses

import numpy as np
import pytest
from small import small_config

from clip_jax.config import ConfigError
from clip_jax.parallel import MESH_AXES, check_rows_of_processes, make_mesh
from clip_jax.parallel.mesh import device_grid


def test_the_mesh_covers_all_devices():
    mesh = make_mesh(small_config(mesh=(-1, 2, 2)))
    assert dict(mesh.shape) == dict(zip(MESH_AXES, (2, 2, 2), strict=True))
    with pytest.raises(ConfigError, match=r"the tensor axis 8 of config.mesh \(1, 1, -1\)"):
        make_mesh(small_config(mesh=(1, 1, -1)))


def test_a_shard_on_two_processes_is_refused():
    """Stand-ins for devices of two hosts with two devices each."""

    class Device:
        def __init__(self, process_index: int) -> None:
            self.process_index = process_index

    class Devices:
        devices = np.array([Device(0), Device(0), Device(1), Device(1)]).reshape(2, 1, 2)

    check_rows_of_processes(Devices())
    Devices.devices = Devices.devices.reshape(1, 1, 4)
    with pytest.raises(ConfigError, match=r"tensor axis of mesh \(1, 1, 4\) spans 2 processes"):
        check_rows_of_processes(Devices())


@dataclasses.dataclass(frozen=True)
class Device:
    """A stand-in for a GPU on a host, or for a device that does not tell its slice."""

    id: int
    slice_index: int | None = None
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "stand-in"


def hosts(*sizes: int) -> list[Device]:
    of_host = [host for host, size in enumerate(sizes) for _ in range(size)]
    return [Device(i, host, host) for i, host in enumerate(of_host)]


@pytest.mark.parametrize(
    ("mesh", "across_data", "across_fsdp"),
    [
        ((-1, 1, 1), 4, 1),
        ((4, 2, 2), 4, 1),
        ((2, 8, 1), 2, 2),  # data crosses as many as it can, fsdp the rest
        ((1, 8, 2), 1, 4),
    ],
)
def test_slices_are_crossed_by_data_then_by_fsdp_and_never_by_tensor(
    mesh, across_data, across_fsdp
):
    config = small_config(mesh=mesh, global_batch_size=64)
    grid = device_grid(config, hosts(4, 4, 4, 4))
    assert sorted(device.id for device in grid.flat) == list(range(16))
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    data, fsdp, _ = grid.shape
    for d in range(data):
        for f in range(fsdp):
            expected = (d * across_data // data) * across_fsdp + f * across_fsdp // fsdp
            assert set(slices[d, f]) == {expected}, "slices are the outer part of an axis"


def test_devices_that_do_not_tell_are_split_as_configured():
    devices = [Device(i, platform="cpu") for i in range(8)]
    config = small_config(mesh=(2, 2, 2), num_slices=2)
    grid = device_grid(config, devices)
    assert [device.id for device in grid[0].flat] == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="num_slices 3 does not divide the 8 devices"):
        device_grid(dataclasses.replace(config, num_slices=3), devices)


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ((4, 4), {"num_slices": 4}, "config.num_slices is 4, but the devices are of 2 slices"),
        ((6, 2), {}, r"slices of different sizes make no mesh: \{0: 6, 1: 2\} devices by slice"),
        (
            (4, 4),
            {"mesh": (1, 1, 8)},
            r"mesh \(1, 1, 8\) = \(1, 1, 8\) does not lie on 2 slices: .* tensor never",
        ),
    ],
)
def test_slices_that_fit_no_mesh_are_refused(sizes, changes, message):
    heads = {"num_heads": 8, "width": 64}
    model = small_config().model
    model = dataclasses.replace(
        model,
        image=dataclasses.replace(model.image, **heads),
        text=dataclasses.replace(model.text, **heads),
    )
    with pytest.raises(ConfigError, match=message):
        device_grid(small_config(model=model, **changes), hosts(*sizes))
