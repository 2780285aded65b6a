"""The tokenizer of a run: found, loaded or trained once, then kept in the workdir."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.checkpoint import AnyPath, Workdir
from clip_jax.config import ExperimentConfig, UserError
from clip_jax.data.configured_text import configured_tokenizer
from clip_jax.data.tokenizer_fit import check_fit
from clip_jax.data.tokenizers import Tokenizer


def prepare_tokenizer(
    config: ExperimentConfig, sources: Mapping[str, Any], workdir: Workdir
) -> Tokenizer:
    """The tokenizer in the workdir, else that of the run it branches off, else the config's.

    Raises ConfigError where its tokens do not fit the text tower, UserError where its file does
    not load.
    """
    kept = workdir.tokenizer
    if config.start.branch is not None and not kept.exists():
        kept = Workdir(config.start.branch).tokenizer
    tokenizer = (
        kept_tokenizer(kept) if kept.exists() else configured_tokenizer(config, sources, None)
    )
    if jax.process_count() > 1:
        digest = hashlib.sha256(tokenizer.to_json().encode()).digest()
        # Training is deterministic; processes that read other captions must not go unnoticed.
        multihost_utils.assert_equal(
            np.frombuffer(digest, np.uint8), "processes have different tokenizers"
        )
    check_fit(tokenizer, config.model.text)
    return tokenizer


def kept_tokenizer(path: AnyPath) -> Tokenizer:
    """The one that a workdir keeps. Raises UserError where its file is not there or is broken."""
    if isinstance(path, Path):
        return Tokenizer.load(path)
    try:
        return Tokenizer.from_json(path.read_text())
    except FileNotFoundError:
        raise UserError(f"cannot read the tokenizer file {path}: it is not there") from None
    except ValueError as error:
        raise UserError(f"{path} is no tokenizer: {error}") from None
