"""The tokenizer of a run: found, loaded or trained once, then kept in the workdir."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.checkpoint import Workdir
from clip_jax.config import ConfigError, ExperimentConfig
from clip_jax.data.pipeline import training_captions
from clip_jax.data.tokenizers import Tokenizer


def prepare_tokenizer(
    config: ExperimentConfig, sources: Mapping[str, Any], workdir: Workdir
) -> Tokenizer:
    """The tokenizer in the workdir, else the one the config asks for.

    Raises ConfigError where its tokens do not fit the text tower.
    """
    if workdir.tokenizer.exists():
        tokenizer = Tokenizer.load(workdir.tokenizer)
    elif config.data.tokenizer.kind == "file":
        tokenizer = Tokenizer.load(Path(config.data.tokenizer.path).expanduser())
    else:
        tokenizer = Tokenizer.train(
            training_captions(sources),
            vocab_size=config.model.text.vocab_size,
            lowercase=config.data.tokenizer.lowercase,
        )
    if jax.process_count() > 1:
        digest = hashlib.sha256(tokenizer.to_json().encode()).digest()
        # Training is deterministic; processes that read other captions must not go unnoticed.
        multihost_utils.assert_equal(
            np.frombuffer(digest, np.uint8), "processes have different tokenizers"
        )
    text = config.model.text
    if tokenizer.vocab_size > text.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but config.model.text.vocab_size is "
            f"{text.vocab_size}"
        )
    if tokenizer.eot_id != text.eot_id:
        raise ConfigError(
            f"the tokenizer's end of text is token {tokenizer.eot_id}, but "
            f"config.model.text.eot_id is {text.eot_id}"
        )
    return tokenizer
