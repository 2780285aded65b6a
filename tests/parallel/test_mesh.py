import os

import jax
import numpy as np
import pytest
from small import small_config

from clip_jax.config import ConfigError, UserError
from clip_jax.parallel import MESH_AXES, check_rows_of_processes, make_mesh, start_processes

LAUNCHERS = ("SLURM_", "OMPI_", "TPU_", "JAX_COORDINATOR")


@pytest.fixture
def joined(monkeypatch):
    """What jax.distributed.initialize was called with: () where it was not."""
    calls = []
    for name in [n for n in os.environ if n.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    before = jax.config.jax_cpu_collectives_implementation
    yield calls
    jax.config.update("jax_cpu_collectives_implementation", before)


STEP = {"SLURM_STEP_NODELIST": "node1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_NODES": "1"}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (STEP | {"SLURM_NTASKS": "8"}, True),  # srun -n8, on one node
        (STEP | {"SLURM_STEP_NUM_TASKS": "8"}, True),
        (STEP | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, False),  # one task of a job
        (STEP | {"SLURM_NTASKS": "1"}, False),
        (STEP, False),
        # The shell of sbatch -N2 -n16: a job, and no step.
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_launchers_are_detected(joined, monkeypatch, environment, several):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    start_processes()
    assert joined == ([(None, None, None)] if several else [])


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        (STEP | {"SLURM_NTASKS": "many"}, "SLURM_NTASKS is 'many'"),
        (STEP | {"SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS is ''"),
        ({"OMPI_COMM_WORLD_SIZE": "4(x2)"}, "OMPI_COMM_WORLD_SIZE is '4(x2)'"),
    ],
)
def test_what_is_no_number_is_named(joined, monkeypatch, environment, name):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as caught:
        start_processes()
    assert name in str(caught.value)
    start_processes("host:1", 2, 0)  # named by hand, nothing is detected


def test_processes_named_by_hand(joined):
    start_processes("[::1]:1234", 2, 1)
    start_processes("node-1.cluster:65535", 1, 0)
    assert joined == [("[::1]:1234", 2, 1), ("node-1.cluster:65535", 1, 0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "give all three of --coordinator=HOST:PORT --num_processes=N"),
        (("host:1", 2, None), "give all three"),
        ((None, 2, 0), "give all three"),
        ((None, None, 0), "give all three"),
        (("host", 2, 0), "--coordinator=host is not HOST:PORT, as in 10.0.0.1:1234"),
        (("host:http", 2, 0), "is not HOST:PORT"),
        (("http://host:1", 2, 0), "is not HOST:PORT"),
        ((":1234", 2, 0), "is not HOST:PORT"),
        (("host:0", 2, 0), "is not HOST:PORT"),
        (("host:65536", 2, 0), "is not HOST:PORT"),
        (("host:1", 2, 2), "--process_id=2 must be from 0 to --num_processes - 1 = 1"),
        (("host:1", 2, -1), "--process_id=-1 must be from 0"),
    ],
)
def test_what_does_not_name_a_process(joined, arguments, message):
    with pytest.raises(UserError) as caught:
        start_processes(*arguments)
    assert message in str(caught.value)
    assert not joined


def test_jax_finds_the_processes_when_asked_to(joined):
    start_processes(distributed=True)
    assert joined == [(None, None, None)]
    with pytest.raises(UserError, match="give it or --coordinator"):
        start_processes("host:1", 2, 0, distributed=True)


def test_what_jax_cannot_join_is_one_line(joined, monkeypatch):
    def fail(*_):
        raise ValueError("coordinator_address\nshould be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    reason = r"\(ValueError: coordinator_address should be defined.\)"
    with pytest.raises(UserError, match=f"can detect {reason}; use --coordinator=HOST:PORT"):
        start_processes(distributed=True)
    with pytest.raises(UserError, match=f"the coordinator host:1 {reason}; can all hosts reach"):
        start_processes("host:1", 2, 0)


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
