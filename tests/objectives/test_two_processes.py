"""The ring on two real processes (gloo) against the formula and against open_clip's own two."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from objectives.oracle import open_clip_losses, random_pairs, relative_error, textbook
from objectives.two_processes import BATCH, BIAS, EMBED_DIM, KINDS, SCALE

NAMES = ("image", "text", "scale", "bias")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def results(tmp_path_factory: Any) -> dict[str, np.ndarray]:
    """Of both processes, rows joined."""
    folder = tmp_path_factory.mktemp("processes")
    script = Path(__file__).with_name("two_processes.py")
    ports = [str(free_port()), str(free_port())]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), *ports, str(folder / f"{rank}.npz")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    parts = [np.load(folder / f"{rank}.npz") for rank in range(2)]
    return {
        name: np.concatenate([part[name] for part in parts])
        if parts[0][name].ndim
        else parts[0][name]
        for name in parts[0].files
    }


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_published_formula(results, kind):
    loss, gradients = textbook(random_pairs(BATCH, EMBED_DIM), SCALE, BIAS, kind=kind)
    assert abs(float(results[f"{kind}_loss"]) - loss) <= 1e-6 * max(loss, SCALE)
    for name, gradient in zip(NAMES, gradients, strict=True):
        assert relative_error(results[f"{kind}_{name}"], gradient) <= 2e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_equals_open_clip_on_two_processes(results, kind):
    if open_clip_losses() is None:
        pytest.skip("open_clip_torch is not installed")
    expected = float(results[f"open_clip_{kind}_loss"])
    assert abs(float(results[f"{kind}_loss"]) - expected) <= 1e-6 * max(expected, SCALE)
    for name in NAMES[: 3 if kind == "softmax" else 4]:
        got, theirs = results[f"{kind}_{name}"], results[f"open_clip_{kind}_{name}"]
        assert relative_error(got, theirs) <= 2e-6, name
