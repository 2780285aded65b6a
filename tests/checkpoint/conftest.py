from pathlib import Path

import pytest
from checkpoint.buckets import Bucket

from clip_jax.checkpoint import Workdir


@pytest.fixture
def bucket():
    """An empty bucket in memory, and the workdir of a run in it."""
    Bucket.empty()
    yield Workdir("teststore://bucket/run")
    Bucket.empty()


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path: Path) -> Workdir:
    """The workdir of a run, on a disk and in a bucket."""
    return Workdir(tmp_path) if request.param == "disk" else request.getfixturevalue("bucket")
