"""Where samples come from: `open_source` turns a config into a source."""

import os
from pathlib import Path

from clip_jax.config.schema import DataConfig, EvalSetConfig, SourceConfig
from clip_jax.data.quickstart import quickstart_tars
from clip_jax.data.sources.webdataset import WebdatasetSource


def open_source(config: SourceConfig | EvalSetConfig, cache_dir: Path) -> WebdatasetSource:
    """Open the source that a config describes; what it has to build goes to `cache_dir`.

    Raises UserError where the path names no files, a tar is damaged or a package is missing.
    """
    path = config.path
    if config.kind == "quickstart":
        path = quickstart_tars(path, cache_dir)
    return WebdatasetSource(path, cache_dir / "index")


def cache_dir(config: DataConfig) -> Path:
    """Where tar indexes and built sets are kept: the config, $CLIP_JAX_CACHE, ~/.cache/clip_jax."""
    chosen = config.cache_dir or os.environ.get("CLIP_JAX_CACHE") or "~/.cache/clip_jax"
    return Path(chosen).expanduser()
