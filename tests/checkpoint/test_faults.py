"""What a run meets: kill -9 at any instant, a full disk, several processes, one that reads harm.

Each for real, in processes of their own.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint.states import abstract_on, is_step
from small import mesh_of

from clip_jax.checkpoint import CheckpointStore

HERE = Path(__file__).parent


def start(script: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, sys.executable, str(HERE / script), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
    )


def output(process: subprocess.Popen[str]) -> dict[str, object]:
    """What a script printed last."""
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    result: dict[str, object] = json.loads(out.splitlines()[-1])
    return result


# ---- Kill ----------------------------------------------------------------------------------------


def kill_and_look(folder: Path, trials: range) -> None:
    process = start("killed.py", folder)
    assert process.stdin is not None
    assert process.stdout is not None
    mesh, before = mesh_of(1), 0
    with contextlib.closing(process.stdin), contextlib.closing(process.stdout):
        for trial in trials:
            process.stdin.write(f"{trial}\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{trial}\n"
            # A reader: the leftovers of the kill stay for the next that saves.
            with contextlib.closing(CheckpointStore(folder)) as store:
                steps = store.steps()
                assert steps[-1] >= before, "a complete checkpoint went away"
                for step in steps:
                    assert is_step(store.restore(abstract_on(mesh), step), step)
                assert store.verify(steps[-1]) == []
                newest, _, metadata = store.restore_latest(abstract_on(mesh))
                assert metadata == {"samples_seen": newest}
                assert newest == steps[-1], "what a kill left was taken for damage"
            before = steps[-1]
            assert not list(folder.glob("*.damaged"))
    assert before > len(trials)
    errors = process.stderr
    assert errors is not None
    errors.close()
    process.wait(timeout=60)
    assert process.returncode == 0


def test_a_kill_at_any_instant_leaves_the_last_checkpoint(tmp_path):
    kill_and_look(tmp_path, range(5))


@pytest.mark.slow
def test_many_kills(tmp_path):
    kill_and_look(tmp_path, range(60))


# ---- Full disk -----------------------------------------------------------------------------------


def test_a_full_disk_costs_the_save_alone(tmp_path):
    mount = f"mount -t tmpfs -o size=16m tmpfs {tmp_path}"
    namespace = ("unshare", "--user", "--map-root-user", "--mount")
    can = subprocess.run([*namespace, "sh", "-c", mount], capture_output=True, check=False)
    if can.returncode:
        pytest.skip("no file system can be mounted here")
    prefix = (*namespace, "sh", "-c", f'{mount} && exec "$@"', "sh")
    found = output(start("full_disk.py", tmp_path, prefix=prefix))
    for step, error in zip((2, 3), found["errors"], strict=True):
        assert error.startswith(f"checkpoint of step {step} is not saved: no space left in ")
        assert "step 1 is as it was; free some" in error
        assert "\n" not in error
    assert found["full"] == {"steps": [1], "good": True, "problems": []}
    assert found["names"] == ["1"]  # nothing half saved keeps the disk full
    assert found["after"] == {"steps": [1, 5], "good": True}


# ---- Two processes -------------------------------------------------------------------------------


def test_two_processes_save_restore_and_fall_back_alike(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [start("two_processes.py", process, port, tmp_path) for process in range(2)]
    first, second = [output(process) for process in processes]
    assert first.pop("hurt")
    assert first.pop("said") == [
        f"checkpoint {tmp_path}/3 is damaged: process 1 cannot read it and says why; it is now "
        "3.damaged, and step 2 is used"
    ]
    (said,) = second.pop("said")
    assert said.startswith("process 1: array opt_state/0/mu [4:8] has changed, in state/ocdbt")
    assert first.pop("refused").startswith("process 1 of 2 cannot go on")
    assert "3 cannot be restored: array opt_state/0/mu" in second.pop("refused")
    assert first == second
    assert first["steps"] == [1, 2, 3]
    for shape in ((8, 1, 1), (1, 8, 1), (1, 1, 8)):
        assert first[str(shape)] == [3, True, {"samples_seen": 3}]
    assert first["after"] == [2, True, {"samples_seen": 2}]
    assert first["left"] == [1, 2]
    # Another number of processes: this one.
    assert len(list((tmp_path / "2" / "checksums").iterdir())) == 2
    with contextlib.closing(CheckpointStore(tmp_path)) as store:
        assert store.verify(2) == []
        for shape in ((1, 1, 1), (2, 2, 2)):
            assert is_step(store.restore(abstract_on(mesh_of(*shape))), 2)
