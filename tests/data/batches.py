"""Batches for the tests: a mixture of two small sources, put together from all hosts."""

import contextlib
import hashlib
from collections.abc import Mapping

import numpy as np

from clip_jax.config.schema import AugmentConfig, DataConfig, ImageTowerConfig, SourceConfig
from clip_jax.data.pipeline import BatchIterator, training_batches
from clip_jax.data.record import Source
from clip_jax.data.source_captions import training_captions
from clip_jax.data.text_inputs import PaddedText
from clip_jax.data.tokenizers import Tokenizer

CONFIG = DataConfig(
    sources={"large": SourceConfig(weight=3.0), "small": SourceConfig(weight=1.0)},
    augment=AugmentConfig(crop_scale=(0.4, 1.0), horizontal_flip=0.5, color_jitter=0.5),
)
ONE = DataConfig(sources={"s": SourceConfig()})
IMAGE = ImageTowerConfig(image_size=12, patch_size=4)
CONTEXT_LENGTH = 8


def small_tokenizer(sources: Mapping[str, Source]) -> Tokenizer:
    return Tokenizer.train(training_captions(sources), 300, lowercase=True)


def padded_text(tokenizer: Tokenizer) -> PaddedText:
    return PaddedText(tokenizer, CONTEXT_LENGTH)


def host_batches(sources, text, *, config=CONFIG, batch=8, host=0, hosts=1, **options):
    """The iterator of one host."""
    options = {"image": IMAGE, "seed": 0, "start_sample": 0} | options
    return training_batches(
        config,
        sources,
        text,
        global_batch_size=batch,
        process_index=host,
        process_count=hosts,
        **options,
    )


def open_hosts(stack: contextlib.ExitStack, hosts: int, *arguments, **options):
    """The iterators of all hosts, closed with the stack."""
    return [
        stack.enter_context(host_batches(*arguments, host=host, hosts=hosts, **options))
        for host in range(hosts)
    ]


def next_batch(iterators: list[BatchIterator]) -> dict[str, np.ndarray]:
    """The next batches of all hosts, put together."""
    parts = [next(iterator) for iterator in iterators]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def global_batches(sources, text, count, *, hosts=1, **options):
    """The first global batches."""
    with contextlib.ExitStack() as stack:
        iterators = open_hosts(stack, hosts, sources, text, **options)
        return [next_batch(iterators) for _ in range(count)]


def digest(batches) -> str:
    digests = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digests.update(batch[name].tobytes())
    return digests.hexdigest()


def joined(batches, name: str) -> np.ndarray:
    return np.concatenate([batch[name] for batch in batches])
