"""Where samples come from: `open_source` turns a config into a source."""

import os
from pathlib import Path
from typing import Literal

from clip_jax.config.schema import DataConfig, EvalSetConfig, SourceConfig
from clip_jax.data.quickstart import quickstart_tars
from clip_jax.data.record import Source
from clip_jax.data.sources.array_record import ArrayRecordSource
from clip_jax.data.sources.folder import FolderSource
from clip_jax.data.sources.parquet import ParquetSource
from clip_jax.data.sources.table import TableSource
from clip_jax.data.sources.tfds import TfdsSource
from clip_jax.data.sources.webdataset import WebdatasetSource


def open_source(
    config: SourceConfig | EvalSetConfig,
    cache_dir: Path,
    *,
    retries: int = 3,
    on_bad_sample: Literal["skip", "fail"] = "skip",
) -> Source:
    """Open the source that a config describes; what it has to build goes to `cache_dir`.

    retries: of a read that fails for a reason that may pass. on_bad_sample: whether files that are
    damaged as a whole are left out or an error. Of an evaluation set with classes, the captions are
    their names; its templates are for the zero-shot score.

    Raises UserError where the path names no files, columns or captions are not there, or a package
    is missing.
    """
    weights: tuple[float, ...] = ()
    templates: tuple[str, ...] = ("{}",)
    if isinstance(config, SourceConfig):
        weights, templates = config.caption_weights, config.templates
    path, keys, index_dir = config.path, config.caption_keys, cache_dir / "index"
    match config.kind:
        case "webdataset" | "quickstart":
            if config.kind == "quickstart":
                path = quickstart_tars(path, cache_dir)
            return WebdatasetSource(
                path,
                index_dir,
                caption_keys=keys,
                caption_weights=weights,
                retries=retries,
                on_bad_sample=on_bad_sample,
            )
        case "tfds":
            return TfdsSource(
                path,
                split=config.split,
                image_key=config.image_key,
                caption_keys=keys,
                caption_weights=weights,
                templates=templates,
                retries=retries,
            )
        case "parquet":
            return ParquetSource(
                path,
                index_dir,
                image_key=config.image_key,
                caption_keys=keys,
                caption_weights=weights,
                templates=templates,
                retries=retries,
                on_bad_sample=on_bad_sample,
            )
        case "table":
            return TableSource(
                path,
                index_dir,
                image_key=config.image_key,
                caption_keys=keys,
                caption_weights=weights,
                retries=retries,
            )
        case "folder":
            return FolderSource(path, index_dir, templates=templates, retries=retries)
        case "array_record":
            return ArrayRecordSource(
                path,
                image_key=config.image_key,
                caption_keys=keys,
                caption_weights=weights,
                retries=retries,
                on_bad_sample=on_bad_sample,
            )


def cache_dir(config: DataConfig) -> Path:
    """Where indexes and built sets are kept: the config, $CLIP_JAX_CACHE, ~/.cache/clip_jax."""
    chosen = config.cache_dir or os.environ.get("CLIP_JAX_CACHE") or "~/.cache/clip_jax"
    return Path(chosen).expanduser()
