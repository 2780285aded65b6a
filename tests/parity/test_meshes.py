"""The same run on one device, on meshes of eight, and on two real processes: the same losses."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from parity.mesh_run import NUM_STEPS, losses_on

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def on_one_device() -> list[float]:
    losses, num_compiles = losses_on((1, 1, 1))
    assert num_compiles == 1
    assert losses[-1] < 0.8 * losses[0], "nothing is learned that could differ"
    return losses


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh)))
def test_every_mesh_has_the_same_losses(on_one_device, mesh):
    losses, num_compiles = losses_on(mesh)
    assert num_compiles == 1
    np.testing.assert_allclose(losses, on_one_device, rtol=TOLERANCE)


def test_two_processes_of_four_devices_have_the_same_losses(on_one_device, tmp_path):
    """With data across them, and with fsdp across them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("mesh_run.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(port), str(tmp_path / f"{rank}.json")],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, said in zip(processes, errors, strict=True):
        assert process.returncode == 0, said[-3000:]
    for rank in range(2):
        for mesh, (losses, num_compiles) in json.loads(
            (tmp_path / f"{rank}.json").read_text()
        ).items():
            assert num_compiles == 1, mesh
            assert len(losses) == NUM_STEPS
            np.testing.assert_allclose(losses, on_one_device, rtol=TOLERANCE, err_msg=mesh)
