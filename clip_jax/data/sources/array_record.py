"""ArrayRecord files of serialised tf.Example messages."""

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError, Record
from clip_jax.data.sources.caption_values import (
    Captions,
    captions_of_values,
    check_captions,
    find_column,
)
from clip_jax.data.sources.files import Files, is_remote, one_line
from clip_jax.data.sources.tar_paths import expand_path
from clip_jax.data.sources.tf_example import read_example

logger = logging.getLogger(__name__)

IMAGE_FEATURES = ("image", "image/encoded", "jpg", "jpeg", "png", "webp", "image_bytes")
CAPTION_FEATURES = ("caption", "captions", "text", "txt", "caption/text", "captions/text", "title")
_CHECKED_RECORDS = 100
# Each open reader keeps 8 bytes for every record of its file and one descriptor; a process may
# have 1,024 open, other libraries' included.
_MAX_OPEN = 256
_THREADS = 16  # more than cores: they wait for the disk
# Random reads: no reading ahead; and with threads of its own each read takes 2 ms, not 50 us.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER = 32768  # bytes, as array_record's own data source


class RecordRange(NamedTuple):
    """Records [first, end) of a file."""

    path: str
    first: int
    end: int


class RecordFiles:
    """The records of ranges of ArrayRecord files, by their number in all of them.

    Opens files where they are first read and keeps 256 open. Pickles to the ranges; threads may
    share it.
    """

    def __init__(self, ranges: Sequence[RecordRange], retries: int = 3) -> None:
        self._ranges = list(ranges)
        self._retries = retries
        self._ends = np.cumsum([part.end - part.first for part in ranges])
        self._prepare()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> bytes:
        """Read a record. Raises IndexError, and BadSampleError "read" or "archive"."""
        number, position = self.place(index)
        path = self._ranges[number].path
        try:
            reader = self._reader(number)
            data: bytes = reader.read([position])[0]
        except RuntimeError as error:
            with self._lock:
                self._open.pop(number, None)  # it may be in a failed state
            Files([path], self._retries).size(0)  # raises "read" where the file is gone
            raise BadSampleError("archive", f"{path}: {one_line(error)}") from None
        return data

    def place(self, index: int) -> tuple[int, int]:
        """The number of the range that holds a record, and its position in the file."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[number - 1]) if number else 0
        return number, self._ranges[number].first + index - before

    def path(self, index: int) -> str:
        """The file that holds a record."""
        return self._ranges[self.place(index)[0]].path

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_ranges", "_retries", "_ends")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def _prepare(self) -> None:
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def _reader(self, number: int) -> Any:
        with self._lock:
            reader = self._open.get(number)
            if reader is not None:
                self._open.move_to_end(number)
                return reader
        part = self._ranges[number]
        reader = open_reader(part.path)  # not locked: opening may wait for a network disk
        if reader.num_records() < part.end:
            raise RuntimeError(f"has {reader.num_records()} records, not {part.end} any more")
        with self._lock:
            reader = self._open.setdefault(number, reader)
            if len(self._open) > _MAX_OPEN:
                # Whoever still reads from it holds on to it: it closes with its last reference.
                self._open.popitem(last=False)
        return reader


def open_reader(path: str) -> Any:  # array_record has no types
    """Open an ArrayRecord file. Raises RuntimeError where it is none or cannot be read."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path, options=_OPTIONS, file_reader_buffer_size=_BUFFER)
    if not reader.ok():
        raise RuntimeError("no ArrayRecord file, or cut short")
    return reader


class ExampleLayout(NamedTuple):
    """Where the tf.Examples of a set have the image and the captions."""

    image: str
    captions: tuple[str, ...]


class ArrayRecordSource:
    """The tf.Examples of some ArrayRecord files, each an encoded image with captions.

    path: local files, see `expand_path`. image_key: the feature that holds the image; "": the first
    of `image`, `image/encoded`, `jpg`, ... that the first records have. caption_keys: those that
    hold captions, one or several each; `a.b` also finds `a/b`; (): the first of `caption`,
    `captions`, `text`, ... caption_weights: see `captions_of_values`.

    on_bad_sample: 'skip' leaves out files that are damaged as a whole, 'fail' raises for them.

    Pickles to its paths and counts; threads may share it. Raises UserError for files that are
    missing or none of this kind, features that are not there, and first records without captions.
    """

    def __init__(
        self,
        path: str,
        *,
        image_key: str = "",
        caption_keys: Sequence[str] = (),
        caption_weights: Sequence[float] = (),
        retries: int = 3,
        on_bad_sample: Literal["skip", "fail"] = "skip",
    ) -> None:
        ranges = _ranges(expand_path(path), path, skip=on_bad_sample == "skip")
        self._records = RecordFiles(ranges, retries)
        self._weights = tuple(caption_weights)
        names = _names(self._records, path)
        keys = tuple(_spelled(key, names) for key in caption_keys) or ("",)
        self._layout = ExampleLayout(
            find_column(image_key, IMAGE_FEATURES, names, path=path, setting="image_key"),
            tuple(
                find_column(key, CAPTION_FEATURES, names, path=path, setting="caption_keys")
                for key in keys
            ),
        )
        check_captions(self, path)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        """Read one record. Raises IndexError and BadSampleError."""
        features = example(self._records[index], None)
        captions = self._captions(features)
        key = str(self._records.place(index)[1])
        return Record(image_of(features, self._layout.image), captions[0], key, captions[1])

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a record. Raises as reading it does."""
        return self._captions(example(self._records[index], self._layout.captions))[0]

    def shard(self, index: int) -> str:
        """The file that holds a record."""
        return self._records.path(index)

    def locate(self, index: int) -> str:
        """A record's file and its position in it."""
        return f"{self._records.path(index)}, record {self._records.place(index)[1]}"

    def _captions(self, features: dict[str, list[bytes] | list[int]]) -> Captions:
        values = [features.get(name) for name in self._layout.captions]
        return captions_of_values(values, self._layout.captions, self._weights)


def example(data: bytes, names: Sequence[str] | None) -> dict[str, list[bytes] | list[int]]:
    """The features of a record. Raises BadSampleError("archive") where it is no tf.Example."""
    try:
        return read_example(data, names)
    except ValueError as error:
        raise BadSampleError("archive", str(error)) from None


def image_of(features: dict[str, list[bytes] | list[int]], name: str) -> bytes:
    """The encoded image. Raises BadSampleError("image") where there is none."""
    values = features.get(name)
    if not values or not isinstance(values[0], bytes):
        raise BadSampleError("image", f"no encoded image in feature '{name}'")
    return values[0]


def _ranges(files: Sequence[str], path: str, *, skip: bool) -> list[RecordRange]:
    """All records of some files, but for those that are damaged as a whole where `skip` says so."""
    remote = next((file for file in files if is_remote(file)), None)
    if remote is not None:
        raise UserError(f"{remote}: ArrayRecord files must be local; mount the bucket or copy them")

    def count(file: str) -> int | RuntimeError:
        try:
            reader = open_reader(file)
        except RuntimeError as error:
            return error
        group = re.search(r"group_size:(\d+)", reader.writer_options_string())
        if group and group[1] != "1":
            logger.warning(
                "%s: records are packed in groups of %s, so that each read unpacks a group; write "
                "with the option group_size:1",
                file,
                group[1],
            )
        return int(reader.num_records())

    with ThreadPoolExecutor(min(_THREADS, len(files))) as pool:
        counts = list(pool.map(count, files))
    ranges = []
    for file, number in zip(files, counts, strict=True):
        if isinstance(number, int):
            ranges.append(RecordRange(file, 0, number))
        elif not skip:
            raise UserError(
                f"{file}: {one_line(number)}; write it again, or set data.on_bad_sample to 'skip'"
            )
        else:
            logger.warning("%s: left out: %s", file, one_line(number))
    if not sum(part.end for part in ranges):
        damaged = len(files) - len(ranges)
        raise UserError(f"{path}: no record in {len(files)} files ({damaged} cannot be read)")
    return ranges


def _names(records: RecordFiles, path: str) -> list[str]:
    """The features of the first records. Raises UserError where they have none."""
    names: dict[str, None] = {}
    problem = "no features"
    for index in range(min(len(records), _CHECKED_RECORDS)):
        try:
            names |= dict.fromkeys(read_example(records[index]))
        except ValueError as error:  # a BadSampleError too
            problem = str(error)
    if not names:
        raise UserError(f"{path}: its records are no tf.Examples with features: {problem}")
    return sorted(names)


def _spelled(key: str, names: Sequence[str]) -> str:
    """`a.b` as tf.Examples write it."""
    return key if key in names else key.replace(".", "/")
