import os
from pathlib import Path

import pytest
from data.tars import pairs, write_tar

from clip_jax.data.sources.webdataset import WebdatasetSource


@pytest.fixture(scope="session")
def quickstart_cache(tmp_path_factory) -> Path:
    """Where the emoji set is built: once for the session, or once for all with $CLIP_JAX_CACHE."""
    shared = os.environ.get("CLIP_JAX_CACHE")
    return Path(shared) if shared else tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="session")
def tar_sources(tmp_path_factory) -> dict[str, WebdatasetSource]:
    """Two sources of different sizes: 40 samples in two tars, and 11."""
    folder = tmp_path_factory.mktemp("tars")
    write_tar(folder / "large-0.tar", pairs(0, 25))
    write_tar(folder / "large-1.tar", pairs(25, 15))
    write_tar(folder / "small.tar", pairs(100, 11, prefix="t"))
    return {
        "large": WebdatasetSource(str(folder / "large-{0,1}.tar"), folder / "index"),
        "small": WebdatasetSource(str(folder / "small.tar"), folder / "index"),
    }
