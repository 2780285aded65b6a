"""Workdirs in buckets over the real protocols: gcsfs and s3fs against emulators on loopback.

They run where gcsfs with gcp-storage-emulator, or s3fs with moto[server], are installed.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

_SCRIPT = """
import sys
from clip_jax.checkpoint import *
from clip_jax.checkpoint.locks import BucketLock
from clip_jax.config import ExperimentConfig, UserError

workdir = Workdir(sys.argv[1])
assert not workdir.exists() and list(workdir.path.iterdir()) == []
with workdir.lock() as lock:
    workdir.save_config(ExperimentConfig(name="in a bucket"))
    assert workdir.load_config().name == "in a bucket"
    try:
        workdir.lock()
        raise AssertionError("locked twice")
    except UserError as error:
        assert "another process" in str(error), error
    lock.refresh()
    lock.check()
    for first, last in ((0, 10), (6, 8)):
        drop_metrics_after(workdir, first)
        file = MetricsFile(workdir, first, 3600.0)
        for step in range(first + 1, last + 1):
            file.write({"step": step, "call": first})
            file.flush()
        file.close()
    lines = [(line["step"], line["call"]) for line in read_metrics(workdir)]
    assert lines == [(step, 0) for step in range(1, 7)] + [(7, 6), (8, 6)], lines
    drop_metrics_after(workdir, 6)
    names = [path.name for path in workdir.path.iterdir()]
    assert names == ["config.json", "lock", "metrics-000000000.jsonl"], names
    add_quarantine(workdir, {"from": 0, "to": 8})
    add_quarantine(workdir, {"from": 8, "to": 16})
    assert len(read_quarantine(workdir)) == 2
    folder = UploadedFolder(workdir.tensorboard, 3600.0)
    (folder.path / "events").write_bytes(b"x" * 2**20)
    folder.close()
    assert (workdir.tensorboard / "events").read_bytes() == b"x" * 2**20
    assert workdir.tensorboard.is_dir() and not workdir.tensorboard.is_file()
    age = lock._age(workdir.config)
    assert 0 <= age < 60, age
assert not (workdir.path / "lock").exists()
nowhere = Workdir(sys.argv[1].replace("bucket", "elsewhere"))
try:
    nowhere.config.write_text("{}")
    raise AssertionError("written without a bucket")
except UserError as error:
    assert "cannot be written" in str(error), error
"""
_EXCLUSIVE = """
BucketLock._free_number = lambda self: 1
with workdir.lock():
    try:
        workdir.lock()
        raise AssertionError("made over another")
    except UserError as error:
        assert "at the same moment" in str(error), error
try:
    workdir.check_writable()
    raise AssertionError("no error for checkpoints")
except UserError as error:
    assert "checkpoints are written to local folders and to gs:// alone" in str(error), error
"""
_CHECKPOINTS = """
from typing import NamedTuple
import jax.numpy as jnp, numpy as np

class State(NamedTuple):
    params: dict

workdir.check_writable()
state = State({"w": jnp.arange(1000.0)})
store = CheckpointStore(workdir.checkpoints)
for step in (1, 2):
    store.save(step, state, {"samples_seen": step})
store.wait()
store.close()
store = CheckpointStore(workdir.checkpoints)
assert store.steps() == [1, 2] and store.latest_step() == 2
assert store.metadata()["samples_seen"] == 2
assert np.array_equal(store.load(["params"])["params"]["w"], state.params["w"])
store.close()
"""


def _needs(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module.split(".")[0]) is None:
            pytest.skip(f"{module} is not installed")


def _run(tmp_path: Path, script: str, url: str, environment: dict[str, str]) -> None:
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(script))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(
        [sys.executable, str(file), url],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def server():
    """Starts a server, and ends it after the test: by its command, with PORT in it."""
    processes = []

    def start(*command: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = tuple(part.replace("PORT", str(port)) for part in command)
        processes.append(subprocess.Popen([sys.executable, "-c", *command]))
        for _ in range(600):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    return f"http://127.0.0.1:{port}"
            time.sleep(0.1)
        raise AssertionError("the server does not start")

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_gcs(tmp_path, server):
    _needs("gcsfs", "gcp_storage_emulator")
    endpoint = server(
        "from gcp_storage_emulator.server import create_server as c;"
        "c('127.0.0.1', PORT, in_memory=True, default_bucket='bucket').run()"
    )
    environment = {
        "STORAGE_EMULATOR_HOST": endpoint,
        "TENSORSTORE_GCS_HTTP_URL": endpoint,
        "GOOGLE_CLOUD_PROJECT": "project",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # the emulator has no gRPC
    }
    _run(tmp_path, _SCRIPT + _CHECKPOINTS, "gs://bucket/a/run", environment)


def test_s3(tmp_path, server):
    _needs("s3fs", "moto")
    endpoint = server("from moto.server import main as m; m(['-H', '127.0.0.1', '-p', 'PORT'])")
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    make = "import s3fs; s3fs.S3FileSystem().mkdir('bucket')\n"
    _run(tmp_path, make + _SCRIPT + _EXCLUSIVE, "s3://bucket/a/run", environment)
