"""Several captions to a row: which caption lies where, and how many rows a group needs.

G consecutive captions of the batch are a group and share R rows of L tokens, by first-fit
decreasing (Johnson 1973). Where each lies depends on the lengths of its group alone: neither on
hosts, devices and workers nor on the other groups.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, cycle, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_jax.config.errors import UserError
from clip_jax.config.schema import DataConfig, SourceConfig
from clip_jax.data.host_batches import choose_caption, sample_order
from clip_jax.data.order import Place
from clip_jax.data.record import Record, Source
from clip_jax.data.sources.tar_paths import expand_tars
from clip_jax.data.streams import SampleStream, StreamedSource
from clip_jax.data.tokenizers import Tokenizer

SHORTEST = 3  # tokens that a caption keeps whatever its group: start, one of the text, end

_NUM_MEASURED = 2**14  # captions: the error of their mean length is 0.8% of their deviation
_NUM_RESAMPLES = 8
_NUM_DRAWN = 2**17  # captions of each: 13 of them are cut where 1e-4 are
_NUM_READERS = 32  # threads: a read from a bucket takes 50 ms
_NUM_STREAM_READERS = 16
# Of encoded images. A stream's samples are read so many at a time, and their images dropped: those
# of 16 threads are 32 MiB. Photographs of 30 kB stay far below the second, of the mean.
_BLOCK_SAMPLES, _BLOCK_BYTES = 64, 2**21
_MOST_BYTES_A_CAPTION = 2**18


class Layout(NamedTuple):
    """Where each caption of a group lies."""

    kept: list[int]  # tokens
    rows: list[int]
    starts: list[int]  # in the row
    segments: list[int]  # 1, 2, ... in each row


class PackedCaptions(NamedTuple):
    """P groups of G captions in R rows each."""

    tokens: NDArray[np.int32]  # [P, R, L]
    segments: NDArray[np.int32]  # [P, R, L]: 1, 2, ... in each row, 0 = padding
    eot: NDArray[np.int32]  # [P, G]: row * L + position of each caption's last token
    num_cut: int  # captions that lost tokens to make room


def pack_captions(
    ids: Sequence[Sequence[int]], *, group_size: int, rows: int, row_length: int, pad_id: int
) -> PackedCaptions:
    """Captions, `group_size` at a time, in rows.

    ids: of each caption, the end of text last; at most `row_length` of them. `len(ids)` is
    divisible by `group_size`, and `rows` are at least `fewest_rows`. A group that does not fit is
    cut as `lay_out` says; a caption that is cut keeps its first tokens and its last.
    """
    lengths = [len(caption) for caption in ids]
    kept: list[int] = []
    row: list[int] = []
    start: list[int] = []
    segment: list[int] = []
    for first in range(0, len(ids), group_size):
        layout = lay_out(lengths[first : first + group_size], rows, row_length)
        kept += layout.kept
        first_row = first // group_size * rows
        row += [first_row + r for r in layout.rows]
        start += layout.starts
        segment += layout.segments
    total = sum(kept)
    kept_b, lengths_b = np.array(kept, np.int64), np.array(lengths, np.int64)
    place_b = np.array(row, np.int64) * row_length + np.array(start, np.int64)
    # Token by token: where it comes from in the captions end to end, and where it goes.
    values = np.fromiter(chain.from_iterable(ids), np.int32, sum(lengths))
    ends_b, kept_ends_b = lengths_b.cumsum(), kept_b.cumsum()
    within = np.arange(total) - np.repeat(kept_ends_b - kept_b, kept_b)
    source = within + np.repeat(ends_b - lengths_b, kept_b)
    source[kept_ends_b - 1] = ends_b - 1
    target = within + np.repeat(place_b, kept_b)
    num_groups = len(ids) // group_size
    shape = (num_groups, rows, row_length)
    tokens, segments = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32)
    tokens.reshape(-1)[target] = values[source]
    segments.reshape(-1)[target] = np.repeat(np.array(segment, np.int32), kept_b)
    eot_PG = (place_b + kept_b - 1).reshape(num_groups, group_size)
    eot_PG -= np.arange(num_groups)[:, None] * (rows * row_length)
    return PackedCaptions(
        tokens, segments, eot_PG.astype(np.int32), int((kept_b < lengths_b).sum())
    )


def lay_out(lengths: Sequence[int], rows: int, row_length: int) -> Layout:
    """Where the captions of one group lie; lengths: at most `row_length` tokens each.

    What finds no room goes to the rows that are asked for least, and of a row that is asked for
    more than it has the longest captions are cut to one length, the largest at which all fit (one
    more token for the first of them, while there is room). None is cut below `SHORTEST`, which
    `fewest_rows` rows have room for.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)  # ties by place
    in_row, asked = _first_fit(lengths, order, rows, row_length)
    kept = list(lengths)
    left = [i for i in order if in_row[i] < 0]
    if left:
        places = [row_length // SHORTEST - in_row.count(r) for r in range(rows)]
        for i in left:
            r = min((r for r in range(rows) if places[r] > 0), key=asked.__getitem__)
            in_row[i] = r
            asked[r] += lengths[i]
            places[r] -= 1
        for r in range(rows):
            if asked[r] > row_length:
                _cut(kept, [i for i in order if in_row[i] == r], row_length)
    starts, segments = [0] * len(kept), [0] * len(kept)
    filled, num_in_row = [0] * rows, [0] * rows
    for i in order:
        r = in_row[i]
        starts[i] = filled[r]
        filled[r] += kept[i]
        num_in_row[r] += 1
        segments[i] = num_in_row[r]
    return Layout(kept, in_row, starts, segments)


def _first_fit(
    lengths: Sequence[int], order: Sequence[int], rows: int, row_length: int
) -> tuple[list[int], list[int]]:
    """The row of each caption, -1 where none has room for it, and the tokens in each row."""
    room = [row_length] * rows
    in_row = [-1] * len(lengths)
    shortest = lengths[order[-1]]
    first = 0  # row that may have room
    for i in order:
        length = lengths[i]
        for r in range(first, rows):
            if room[r] >= length:
                room[r] -= length
                in_row[i] = r
                break
        while first < rows and room[first] < shortest:
            first += 1
    return in_row, [row_length - left for left in room]


def _cut(kept: list[int], captions: Sequence[int], row_length: int) -> None:
    """Cuts the longest of these captions, so that all fit a row."""
    lengths = [kept[i] for i in captions]
    longest = max(lengths)
    while sum(min(length, longest) for length in lengths) > row_length:
        longest -= 1
    assert longest >= SHORTEST, f"{len(lengths)} captions in a row of {row_length}"
    spare = row_length - sum(min(length, longest) for length in lengths)
    for i in captions:
        if kept[i] > longest:
            kept[i] = longest + (spare > 0)
            spare -= 1


def fewest_rows(group_size: int, row_length: int) -> int:
    """Rows that have room for `SHORTEST` tokens of each caption of a group."""
    return -(-group_size // (row_length // SHORTEST))


def choose_rows(
    lengths: NDArray[np.integer],
    group_size: int,
    context_length: int,
    max_cut: float = 1e-4,
) -> int:
    """The fewest rows of `context_length` tokens at which packing cuts a share `max_cut` or less.

    lengths: tokens of measured captions, start and end included. The share is that of groups
    drawn from them, always the same ones (Efron 1979), and the most rows of several resamples are
    taken: the measured captions are a sample too. At most `group_size`: a caption to a row.
    """
    rng = np.random.default_rng(0)
    lengths = np.minimum(lengths, context_length)
    return max(
        _rows_of_sample(rng.choice(lengths, len(lengths)), group_size, context_length, max_cut, rng)
        for _ in range(_NUM_RESAMPLES)
    )


def _rows_of_sample(
    lengths: NDArray[np.integer],
    group_size: int,
    row_length: int,
    max_cut: float,
    rng: np.random.Generator,
) -> int:
    num_groups = -(-_NUM_DRAWN // group_size)
    drawn = rng.choice(lengths, (num_groups, group_size))
    groups_NG = np.sort(drawn, axis=1)[:, ::-1]
    needed_N = _rows_needed(groups_NG, row_length)
    fewest = fewest_rows(group_size, row_length)
    rows = max(int(needed_N.max()), fewest)
    while rows > fewest:
        num_cut = 0
        for group in groups_NG[needed_N > rows - 1].tolist():
            kept = lay_out(group, rows - 1, row_length).kept
            num_cut += sum(k < length for k, length in zip(kept, group, strict=True))
            if num_cut > max_cut * num_groups * group_size:
                return rows
        rows -= 1
    return rows


def _rows_needed(groups_NG: NDArray[np.integer], row_length: int) -> NDArray[np.int64]:
    """Rows that first-fit takes for each of N groups of lengths, the longest first."""
    num_groups, group_size = groups_NG.shape
    room_NR = np.full((num_groups, group_size), row_length, np.int16)
    every_N = np.arange(num_groups)
    for length_N in groups_NG.T:
        row_N = (room_NR >= length_N[:, None]).argmax(axis=1)
        room_NR[every_N, row_N] -= length_N.astype(np.int16)
    needed_N: NDArray[np.int64] = (room_NR < row_length).sum(axis=1)
    return needed_N


def measure_lengths(
    config: DataConfig,
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    *,
    context_length: int,
    seed: int = 0,
    num_captions: int = _NUM_MEASURED,
) -> NDArray[np.int32]:
    """Tokens of captions of the mixture, start and end included, cut at `context_length`.

    Of the first samples of the order with this seed, a caption each as in training, without
    reading images; bad samples are left out. Of small sources, eight captions a sample. Raises
    UserError where all are bad.
    """
    num_captions = min(num_captions, 8 * sum(map(len, sources.values())))
    places = sample_order(config, sources, seed).places(range(num_captions))

    def read(place: Place) -> tuple[str, ...]:
        try:
            return sources[place.source].captions(place.row)
        except (ValueError, OSError):
            return ()

    with ThreadPoolExecutor(_NUM_READERS) as readers:
        found = list(readers.map(read, places))
    rng = np.random.default_rng(seed)
    captions = [
        _one(config.sources[place.source], texts, rng)
        for place, texts in zip(places, found, strict=True)
        if texts
    ]
    return _lengths(captions, num_captions, config, tokenizer, context_length)


def measure_streamed_lengths(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    context_length: int,
    seed: int = 0,
    num_captions: int = _NUM_MEASURED,
) -> NDArray[np.int32]:
    """As `measure_lengths`, of sources that stream: from the tars that each stream reads first.

    Reads whole samples and drops their images: 0.5 GB for 16,384 photographs of 30 kB, and at most
    256 KiB of images for each caption that is asked for (4 GiB for as many), but for the last 2 MiB
    and one sample of each stream. Where that limit or its tars end before a source's share of the
    mixture, it gives the samples that were read several times; where all sources are small, eight
    captions each.
    Raises UserError where there are fewer tars than streams, and as `SampleStream` does.
    """
    total = sum(source.weight for source in config.sources.values())
    streams = config.stream.num_streams
    shares = {name: num_captions * source.weight / total for name, source in config.sources.items()}

    def read(job: tuple[StreamedSource, int]) -> list[Record]:
        source, stream = job
        return _first_records(
            source, stream, math.ceil(shares[source.name] / streams), config, seed
        )

    opened = [
        StreamedSource(
            name=name,
            tars=tuple(expand_tars(source.path)),
            caption_keys=source.caption_keys,
            caption_weights=source.caption_weights,
        )
        for name, source in config.sources.items()
    ]
    jobs = [(source, stream) for source in opened for stream in range(streams)]
    with ThreadPoolExecutor(_NUM_STREAM_READERS) as readers:
        found = list(readers.map(read, jobs))
    records: dict[str, list[Record]] = {name: [] for name in config.sources}
    for (source, _), some in zip(jobs, found, strict=True):
        records[source.name] += some
    scale = min(1.0, 8 * sum(map(len, records.values())) / num_captions)
    rng = np.random.default_rng(seed)
    captions = [
        record.captions[choose_caption(config.sources[name], record, rng)]
        for name, some in records.items()
        for record in islice(cycle(some), round(scale * shares[name]))
    ]
    return _lengths(captions, num_captions, config, tokenizer, context_length)


def _first_records(
    source: StreamedSource, stream: int, count: int, config: DataConfig, seed: int
) -> list[Record]:
    """So many samples of a stream without their images; fewer where its tars or bytes end."""
    window = dataclasses.replace(config.stream, window=min(count, _BLOCK_SAMPLES))
    reader = SampleStream(
        source,
        stream,
        config=window,
        seed=seed,
        retries=config.read_retries,
        window_bytes=_BLOCK_BYTES,
    )
    records: list[Record] = []
    num_bytes = 0
    try:
        while len(records) < count and num_bytes < count * _MOST_BYTES_A_CAPTION:
            block = reader.read_block()
            num_bytes += sum(sample.num_bytes for sample in block.samples)
            records += [sample.record._replace(image=b"") for sample in block.samples]
            if reader.epoch:  # the tars would come again
                break
    finally:
        reader.close()
    return records[:count]


def _lengths(
    captions: Sequence[str],
    num_samples: int,
    config: DataConfig,
    tokenizer: Tokenizer,
    context_length: int,
) -> NDArray[np.int32]:
    if not captions:
        raise UserError(
            f"none of {num_samples} samples of {', '.join(sorted(config.sources))} has a caption "
            "that can be read; `clip-jax data check` says why"
        )
    return np.array([len(ids) for ids in tokenizer.encode(captions, context_length)], np.int32)


def _one(source: SourceConfig, captions: tuple[str, ...], rng: np.random.Generator) -> str:
    """A caption of one sample, as often as training takes it."""
    weights = tuple(weight for weight in source.caption_weights if weight > 0)
    if len(weights) != len(captions):  # a key has several or none: each as often, then
        weights = ()
    return captions[choose_caption(source, Record(b"", captions, "", weights), rng)]
