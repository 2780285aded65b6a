"""A few samples of a source, whatever its size: without an index of all of it."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clip_jax.config import DataConfig, EvalSetConfig, SourceConfig
from clip_jax.data.record import BadSampleError, Record, Source
from clip_jax.data.sources import open_source
from clip_jax.data.sources.files import is_remote, open_sequential
from clip_jax.data.sources.tar_index import index_file
from clip_jax.data.sources.tar_paths import expand_path, expand_tars
from clip_jax.data.sources.tar_stream import END, tar_samples

# Of a set with more files these are looked into: the first, the middle and the last.
_NUM_FILES = 3
_NUM_HEAD = 24  # samples at the head of each tar
# Local tars without an index that are indexed, if they are no larger together: a run would do it.
_MOST_TARS, _MOST_BYTES = 4, 2**31
_IN_FILES = ("parquet", "table", "array_record")
_SPECIAL = frozenset(",{}*?[]")  # of a pattern, in the name of a file


class Sampled(NamedTuple):
    """Samples to look at, and how many there are in all."""

    source: Source
    total: int
    exact: bool  # False: `total` was estimated from some of the files
    files: tuple[str, ...]  # of the whole set, where it is one of files


class Counted:
    """A source of which the number of samples alone is known."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


class _Entry(NamedTuple):
    tar: str
    key: str
    record: Record | BadSampleError


class TarHeads:
    """The samples at the heads of some tars, in memory: a `Source`."""

    num_skipped = 0

    def __init__(self, entries: Sequence[_Entry]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Record:
        record = self._entries[index].record
        if isinstance(record, BadSampleError):
            raise record
        return record

    def captions(self, index: int) -> tuple[str, ...]:
        return self[index].captions

    def shard(self, index: int) -> str:
        return self._entries[index].tar

    def locate(self, index: int) -> str:
        entry = self._entries[index]
        return f"{entry.tar}, key {entry.key}" if entry.key else entry.tar


def sample_source(config: SourceConfig | EvalSetConfig, data: DataConfig, cache: Path) -> Sampled:
    """Opens what a run would open, or a few of its files where that would take long.

    Raises UserError as `open_source` does.
    """
    streams = isinstance(config, SourceConfig) and config.access == "stream"
    skips = isinstance(config, SourceConfig) and data.on_bad_sample == "skip"
    retries = min(data.read_retries, 1)
    files: list[str] = []
    if config.kind == "webdataset":
        index_dir = cache / "index"
        files = expand_tars(
            config.path,
            lambda tar: skips and not streams and index_file(tar, index_dir).exists(),
        )
        if streams or not _is_soon_indexed(files, index_dir):
            return _heads(config, files, retries)
    elif config.kind in _IN_FILES:
        files = expand_path(config.path)
        few = _spread(files)
        if len(few) < len(files) and not _SPECIAL & set("".join(few)):
            part = dataclasses.replace(config, path=",".join(few))
            source = open_source(part, cache, retries=retries)
            return Sampled(source, len(source) * len(files) // len(few), False, tuple(files))
    source = open_source(config, cache, retries=retries, on_bad_sample="skip" if skips else "fail")
    return Sampled(source, len(source), True, tuple(files))


def _spread(files: Sequence[str]) -> list[str]:
    last = len(files) - 1
    places = {round(step * last / (_NUM_FILES - 1)) for step in range(_NUM_FILES)}
    return [files[place] for place in sorted(places)]


def _is_soon_indexed(tars: Sequence[str], index_dir: Path) -> bool:
    unknown = [tar for tar in tars if not index_file(tar, index_dir).exists()]
    if len(unknown) > _MOST_TARS or any(map(is_remote, unknown)):
        return False
    return sum(map(os.path.getsize, unknown)) <= _MOST_BYTES


def _heads(config: SourceConfig | EvalSetConfig, tars: Sequence[str], retries: int) -> Sampled:
    """Raises UserError where a package is missing; what else is wrong with a tar is a sample."""
    weights = config.caption_weights if isinstance(config, SourceConfig) else ()
    entries: list[_Entry] = []
    numbers: list[float] = []  # of samples, of each tar
    few = _spread(tars)
    for tar in few:
        count, after, num_bytes = 0, END, 0
        try:
            with open_sequential(tar, 0, retries) as file:
                num_bytes = file.size
                for sample in tar_samples(file):
                    record: Record | BadSampleError
                    try:
                        record = sample.record(config.caption_keys, weights)
                    except BadSampleError as error:
                        record = error
                    entries.append(_Entry(tar, sample.key, record))
                    count, after = count + 1, sample.after
                    if count == _NUM_HEAD:
                        break
        except BadSampleError as error:
            entries.append(_Entry(tar, "", error))
        numbers.append(count if after == END else count * num_bytes / after)
    exact = len(few) == len(tars) and all(number == int(number) for number in numbers)
    exact = exact and len(entries) < _NUM_HEAD * len(few)
    total = round(sum(numbers) / len(numbers) * len(tars))
    return Sampled(TarHeads(entries), total, exact, tuple(tars))
