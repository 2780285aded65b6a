"""The tokenizer of a run: found, loaded or trained once, then kept in the workdir."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.checkpoint import Workdir
from clip_jax.config import ExperimentConfig
from clip_jax.data.configured_text import configured_tokenizer
from clip_jax.data.tokenizer_fit import check_fit
from clip_jax.data.tokenizers import Tokenizer


def prepare_tokenizer(
    config: ExperimentConfig, sources: Mapping[str, Any], workdir: Workdir
) -> Tokenizer:
    """The tokenizer in the workdir, else the one the config asks for.

    Raises ConfigError where its tokens do not fit the text tower, UserError where its file does
    not load.
    """
    tokenizer = configured_tokenizer(config, sources, workdir.tokenizer)
    if jax.process_count() > 1:
        digest = hashlib.sha256(tokenizer.to_json().encode()).digest()
        # Training is deterministic; processes that read other captions must not go unnoticed.
        multihost_utils.assert_equal(
            np.frombuffer(digest, np.uint8), "processes have different tokenizers"
        )
    check_fit(tokenizer, config.model.text)
    return tokenizer
