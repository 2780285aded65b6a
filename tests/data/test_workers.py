import os

import pytest

from clip_jax.data.workers import WorkerEnvironment


@pytest.mark.parametrize("before", [None, "tpu"])
def test_the_last_one_out_restores(monkeypatch, before):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if before is not None:
        monkeypatch.setenv("JAX_PLATFORMS", before)
    first = WorkerEnvironment()
    second = WorkerEnvironment()
    first.restore()
    first.restore()
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    second.restore()
    assert os.environ.get("JAX_PLATFORMS") == before
