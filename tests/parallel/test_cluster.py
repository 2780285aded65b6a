import importlib.util
import os

import jax
import pytest

from clip_jax.config import UserError
from clip_jax.parallel import start_processes

LAUNCHERS = (
    "SLURM_",
    "OMPI_",
    "PMI_",
    "MPI_",
    "TPU_",
    "MEGASCALE_",
    "JAX_COORD",
    "JAX_NUM",
    "JOB_",
)


@pytest.fixture
def joined(monkeypatch):
    """What jax.distributed.initialize was called with, less the heartbeats; [] where it was not."""
    calls = []
    for name in [n for n in os.environ if n.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)

    def initialize(*arguments, heartbeat_timeout_seconds, **options):
        assert heartbeat_timeout_seconds == 100
        calls.append((*arguments, options) if options else arguments)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
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
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_PROCESS_ADDRESSES": "10.0.0.1:8476,10.0.0.2:8476"}, True),
        ({"TPU_WORKER_HOSTNAMES": "host", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "host", "MEGASCALE_NUM_SLICES": "1"}, False),
        ({"JAX_COORDINATOR_ADDRESS": "host:1", "JOB_COMPLETION_INDEX": "0"}, False),
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
    def fail(*_, **__):
        raise ValueError("coordinator_address\nshould be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    reason = r"\(ValueError: coordinator_address should be defined.\)"
    with pytest.raises(UserError, match=f"can detect {reason}; use --coordinator=HOST:PORT"):
        start_processes(distributed=True)
    with pytest.raises(UserError, match=f"the coordinator host:1 {reason}; can all hosts reach"):
        start_processes("host:1", 2, 0)


MEET = {"JAX_COORDINATOR_ADDRESS": "host:1"}


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        (MEET | {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, ("host:1", 4, 3)),
        # An indexed job of Kubernetes, as launch/gke_jobset.yaml starts it.
        (MEET | {"JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}, ("host:1", 4, 2)),
        # Open MPI 5 names nothing to meet at.
        (
            MEET
            | {
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            },
            ("host:1", 4, 3, {"local_device_ids": [1]}),
        ),
        (MEET | {"PMI_SIZE": "2", "PMI_RANK": "1"}, ("host:1", 2, 1)),
    ],
)
def test_where_to_meet_may_stand_in_the_environment(joined, monkeypatch, environment, arguments):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    start_processes()
    assert joined == [arguments]


def test_mpi_without_a_place_to_meet(joined, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"MPI started 4 processes .* JAX_COORDINATOR_ADDRESS=HOST"):
        start_processes()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "mpi4py")
    start_processes()
    assert joined == [(None, None, None, {"cluster_detection_method": "mpi4py"})]


def test_a_job_that_is_not_indexed_is_told(joined, monkeypatch):
    for name, value in (MEET | {"JAX_NUM_PROCESSES": "4"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"needs .JAX_PROCESS_ID too .* completionMode: Indexed"):
        start_processes()


def test_heartbeats_are_those_asked_for(monkeypatch):
    found = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: found.update(options))
    before = jax.config.jax_cpu_collectives_implementation
    start_processes("host:1", 2, 0, heartbeat_seconds=7)
    jax.config.update("jax_cpu_collectives_implementation", before)
    assert found == {"heartbeat_timeout_seconds": 7}
