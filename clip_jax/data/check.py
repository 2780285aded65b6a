"""What `clip-jax data check` finds out about a source: sizes, captions, tokens, copies, damage.

Samples are read in threads and forgotten once they are counted. What is kept of each are three
hashes and its row, 32 bytes; all else is counts.
"""

import io
import itertools
import logging
import math
import os
import re
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from clip_jax.config.errors import UserError
from clip_jax.data.check_result import (
    BadSample,
    CommonCaption,
    Examples,
    PackingFigures,
    SourceCheck,
)
from clip_jax.data.decode import open_picture
from clip_jax.data.duplicates import (
    Groups,
    Hashes,
    difference_hash,
    digest,
    equal_groups,
    look_alike_groups,
)
from clip_jax.data.packing import choose_rows
from clip_jax.data.record import Source
from clip_jax.data.report import why_bad
from clip_jax.data.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

_CHUNK = 32  # samples that a thread takes at a time
_LONGEST = 1024  # tokens: longer captions count as so many
_SEEN_SIDE = 64  # pixels of the longer side: a JPEG is decoded at a fraction of its size
_MOST_MESSAGES = 5  # of each reason why samples are bad
_MOST_EXAMPLES = 8  # of each kind

# Captions that are text and yet say little of the picture, or say it broken.
_SUSPICIOUS: dict[str, Callable[[str], object]] = {
    "one word": lambda caption: len(caption.split()) < 2,
    "not UTF-8 (has the replacement character)": re.compile("\ufffd").search,
    "a file name or a URL": re.compile(
        r"https?://\S|^\S+\.(jpe?g|png|webp|gif|bmp|tiff?)$|^(img|dscn?|image)[-_ ]?\d+$", re.I
    ).search,
    "HTML left in": re.compile(r"</?[a-z][^<>]*>|&([a-z]{2,8}|#\d+);", re.I).search,
    "no letter": lambda caption: not any(map(str.isalpha, caption)),
}


class _CaptionFigures(NamedTuple):
    characters: int
    words: int
    tokens: int
    suspicions: tuple[str, ...]


class _Measured(NamedTuple):
    """What is counted of a usable sample."""

    row: int
    width: int
    height: int
    num_bytes: int
    format: str
    mode: str
    image_digest: int
    look: int
    caption_digest: int  # of the first
    captions: tuple[_CaptionFigures, ...]


class _Extremes:
    """The rows with the smallest values seen."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._kept: list[tuple[float, int]] = []
        self._largest = -math.inf

    def add(self, value: float, row: int) -> None:
        self._largest = max(self._largest, value)
        if len(self._kept) < _MOST_EXAMPLES or (value, row) < self._kept[-1]:
            self._kept = sorted([*self._kept, (value, row)])[:_MOST_EXAMPLES]

    def examples(self) -> Examples:
        """None where all values are equal."""
        return Examples(self._title, [row for value, row in self._kept if value < self._largest])


def check_source(
    name: str,
    source: Source,
    tokenizer: Tokenizer,
    *,
    context_length: int,
    image_size: int,
    group_size: int = 0,
    num_samples: int | None = None,
    num_threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SourceCheck:
    """Read samples of a source, evenly spread, and count what they hold.

    image_size: of the tower, for which smaller pictures are enlarged. group_size: captions of a
    group, for what packing would give; 0: not asked. num_samples: at most so many; None: all.
    num_threads: None: one per processor. progress: called with the samples read so far and in all.
    The result does not depend on the number of threads.
    """
    started = time.monotonic()
    total = len(source)
    count = total if num_samples is None else min(num_samples, total)
    check = SourceCheck(name, total, count, context_length, image_size)
    # Sources leave out samples without image or caption when they are indexed; tars say what else.
    check.num_skipped = getattr(source, "num_skipped", 0)
    check.damaged = [f"{file}: {reason}" for file, reason in getattr(source, "damaged", ())]
    ends = _shard_ends(source, 0, total)
    for start, end in itertools.pairwise([0, *ends]):
        check.shard_sizes.add(end - start)
    hashes: dict[str, array[int]] = {key: array("Q") for key in ("row", "image", "look", "caption")}
    extremes = {
        title: _Extremes(title)
        for title in ("Most tokens", "Fewest words", "Smallest pictures", "Most elongated pictures")
    }
    suspects = {title: Examples(f"Captions: {title}") for title in _SUSPICIOUS}
    done = 0
    for samples in _measured(source, tokenizer, count, num_threads or os.cpu_count() or 1):
        for sample in samples:
            if isinstance(sample, BadSample):
                _count_bad(check, sample)
                continue
            _count(check, sample)
            _keep_examples(sample, extremes, suspects)
            for key, value in zip(
                hashes,
                (sample.row, sample.image_digest, sample.look, sample.caption_digest),
                strict=True,
            ):
                hashes[key].append(value)
        done += len(samples)
        progress(done, count)
    _find_copies(check, source, {key: np.array(kept, np.uint64) for key, kept in hashes.items()})
    if group_size and tokenizer.eot_id is not None and check.num_usable:
        lengths = np.fromiter(check.tokens, np.int32, len(check.tokens))
        rows = choose_rows(lengths, group_size, context_length)
        check.packing = PackingFigures(group_size, rows)
    step = max(1, check.num_usable // _MOST_EXAMPLES)
    typical = Examples("Evenly spread", list(hashes["row"][::step][:_MOST_EXAMPLES]))
    check.examples = [typical, *(kept.examples() for kept in extremes.values()), *suspects.values()]
    check.seconds = time.monotonic() - started
    return check


def _shard_ends(source: Source, start: int, end: int) -> Iterator[int]:
    """Where the shards of rows [start, end) end: a shard's rows follow each other."""
    if start == end:
        return
    if source.shard(start) == source.shard(end - 1):
        yield end
        return
    middle = (start + end) // 2
    left = list(_shard_ends(source, start, middle))
    if source.shard(middle - 1) == source.shard(middle):
        left.pop()
    yield from left
    yield from _shard_ends(source, middle, end)


def _measured(
    source: Source, tokenizer: Tokenizer, count: int, num_threads: int
) -> Iterator[list[_Measured | BadSample]]:
    """Chunks of samples in the order of their rows, measured a few ahead."""
    total = len(source)
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[Future[list[_Measured | BadSample]]] = deque()
        try:
            for first in range(0, count, _CHUNK):
                spread = range(first, min(first + _CHUNK, count))
                rows = [number * total // count for number in spread]
                waiting.append(pool.submit(_measure, source, tokenizer, rows))
                if len(waiting) > 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # an interrupt must not wait for what nobody takes
            for future in waiting:
                future.cancel()


def _measure(
    source: Source, tokenizer: Tokenizer, rows: Sequence[int]
) -> list[_Measured | BadSample]:
    samples: list[_Measured | BadSample] = []
    for row in rows:
        try:
            samples.append(_measure_one(source, tokenizer, row))
        except UserError:  # nothing that is wrong with a sample
            raise
        except (ValueError, OSError) as error:
            reason = why_bad(error, "image")
            shard = source.shard(row)
            # To name a sample its file is read, which may take long where that has failed.
            name = f"{shard}, sample {row}" if reason == "read" else source.locate(row)
            samples.append(BadSample(row, reason, str(error), shard, name))
    return samples


def _measure_one(source: Source, tokenizer: Tokenizer, row: int) -> _Measured:
    record = source[row]
    picture = open_picture(record.image)
    width, height = picture.size
    shrink = min(1, _SEEN_SIDE / max(width, height))
    seen = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    pixels = picture.view((0, 0, width, height), seen, decode="fast", interpolation="bilinear")
    header = Image.open(io.BytesIO(record.image))  # which has decoded: it opens
    ids = tokenizer.encode(record.captions, _LONGEST)
    captions = tuple(
        _CaptionFigures(
            len(caption),
            len(caption.split()),
            len(tokens),
            tuple(title for title, looks_it in _SUSPICIOUS.items() if looks_it(caption)),
        )
        for caption, tokens in zip(record.captions, ids, strict=True)
    )
    return _Measured(
        row,
        width,
        height,
        len(record.image),
        header.format or "",
        header.mode,
        digest(record.image),
        difference_hash(Image.fromarray(pixels)),
        digest(record.captions[0].encode("utf-8", "surrogatepass")),
        captions,
    )


def _count_bad(check: SourceCheck, sample: BadSample) -> None:
    check.num_bad[sample.reason] += 1
    check.bad_by_shard[sample.shard] += 1
    if check.num_bad[sample.reason] <= _MOST_MESSAGES:
        check.bad_samples.append(sample)


def _count(check: SourceCheck, sample: _Measured) -> None:
    check.num_usable += 1
    check.widths.add(sample.width)
    check.heights.add(sample.height)
    check.shorter_sides.add(min(sample.width, sample.height))
    check.aspects.add(sample.width / sample.height)
    check.num_bytes.add(float(f"{sample.num_bytes:.3g}"))
    check.formats[sample.format] += 1
    check.modes[sample.mode] += 1
    check.captions_per_image.add(len(sample.captions))
    for caption in sample.captions:
        check.characters.add(caption.characters)
        check.words.add(caption.words)
        check.tokens.add(caption.tokens)
        check.suspicious.update(caption.suspicions)


def _keep_examples(
    sample: _Measured, extremes: dict[str, _Extremes], suspects: dict[str, Examples]
) -> None:
    longer, shorter = max(sample.width, sample.height), min(sample.width, sample.height)
    values = {
        "Most tokens": -max(caption.tokens for caption in sample.captions),
        "Fewest words": min(caption.words for caption in sample.captions),
        "Smallest pictures": shorter,
        "Most elongated pictures": -longer / shorter,
    }
    for title, value in values.items():
        extremes[title].add(value, sample.row)
    for title in {title for caption in sample.captions for title in caption.suspicions}:
        if len(suspects[title].rows) < _MOST_EXAMPLES:
            suspects[title].rows.append(sample.row)


def _find_copies(check: SourceCheck, source: Source, hashes: Mapping[str, Hashes]) -> None:
    rows = hashes["row"]

    def with_rows(groups: Groups, rows: Hashes) -> Groups:
        largest = [group._replace(members=rows[group.members].tolist()) for group in groups.largest]
        return groups._replace(largest=tuple(largest))

    check.equal_images = with_rows(equal_groups(hashes["image"]), rows)
    # One of each group of equal images: what looks alike then is not equal.
    firsts = np.sort(np.unique(hashes["image"], return_index=True)[1])
    check.look_alikes = with_rows(look_alike_groups(hashes["look"][firsts]), rows[firsts])
    check.equal_captions = with_rows(equal_groups(hashes["caption"]), rows)
    for size, (row, *_) in check.equal_captions.largest:
        try:
            check.common_captions.append(CommonCaption(source.captions(row)[0], size, row))
        except (ValueError, OSError) as error:  # storage that comes and goes
            logger.warning("%s: a second read failed: %s", source.locate(row), error)
