"""The lines that a run writes as it goes: metrics, and samples that it could not use.

On a local disk they are appended to one file, NAME.jsonl. Objects of a bucket cannot be appended
to: there the lines lie in parts, NAME-NUMBER.jsonl, each named by the number (the step, or the
position in the order of the data) from which on it has lines. The last part is written again and
again while it grows, in the background. All are read alike: NAME.jsonl, then the parts.
"""

import contextlib
import json
import logging
import re
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from clip_jax.checkpoint.paths import AnyPath, BucketPath, write_atomically
from clip_jax.checkpoint.uploads import Background
from clip_jax.checkpoint.workdir import Workdir
from clip_jax.config import UserError

_log = logging.getLogger(__name__)

# A part that has grown so far is left alone, and another begun: it is written whole every time.
_PART_BYTES = 4 * 2**20
_READERS = 16  # requests at a time for the parts of a long run


class MetricsFile:
    """What a call of `train` adds to the metrics of its run; one process writes them.

    In a bucket a crash loses the lines of the last `upload_seconds` at most, and none before the
    last `flush`. A store that fails never ends the run: the lines wait for the next attempt.
    """

    def __init__(self, workdir: Workdir, first_step: int, upload_seconds: float) -> None:
        """first_step: where this call begins; `drop_metrics_after` has gone before."""
        path = workdir.metrics
        self._lines = _lines_file(path, first_step, upload_seconds)
        if isinstance(path, Path):
            path.touch()

    def write(self, line: Mapping[str, Any]) -> None:
        """line: with its `step`; its numbers are finite."""
        self._lines.write(line["step"], json.dumps(line, allow_nan=False) + "\n")

    def flush(self) -> None:
        """Brings all lines to the store, or gives up for now after 30 s: before a checkpoint."""
        self._lines.flush()

    def close(self) -> None:
        """Brings all lines to the store, in several attempts."""
        self._lines.close()


class BadSamplesFile:
    """What a process adds to its list of the samples that it could not use; see `MetricsFile`.

    No file is made before there is such a sample.
    """

    def __init__(self, path: AnyPath, first_position: int, upload_seconds: float) -> None:
        """path: `Workdir.bad_samples` of the process."""
        self._lines = _lines_file(path, first_position, upload_seconds)

    def write(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """samples: each with its `position` in the order of the data."""
        for sample in samples:
            self._lines.write(sample["position"], json.dumps(sample) + "\n")

    def flush(self) -> None:
        """As `MetricsFile.flush`."""
        self._lines.flush()

    def close(self) -> None:
        self._lines.close()


def read_metrics(where: Workdir | AnyPath) -> list[dict[str, Any]]:
    """The metrics of a run in order of steps, by its workdir or the path of its metrics.jsonl.

    A last line of a file cut short by a crash is left out. Raises UserError where another line is
    no metrics line: nothing is thrown away unseen.
    """
    files = _read_files(where.metrics if isinstance(where, Workdir) else where)
    lines = [line for path, text in files for line in _metrics_of(path, text)]
    if len(files) > 1:  # a run that was moved to or from a bucket has both kinds, in any order
        lines.sort(key=lambda line: line["step"])
    return lines


def drop_metrics_after(where: Workdir | AnyPath, step: int) -> None:
    """Keeps the lines up to `step`: what follows is computed again by the resumed run.

    Raises as `read_metrics`, before anything is changed. No `MetricsFile` may be open meanwhile.
    """
    path = where.metrics if isinstance(where, Workdir) else where
    files = [(file, text, _metrics_of(file, text)) for file, text in _read_files(path)]
    for file, text, lines in files:
        kept = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step)
        _replace(file, text, kept, is_part=file != path)


def drop_bad_samples_after(path: AnyPath, position: int) -> None:
    """Keeps what a process found bad before `position` in the order.

    What follows is read again by the resumed run. A line cut short by a crash is left out.
    """
    for file, text in _read_files(path):
        kept = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["position"] < position:
                    kept.append(line + "\n")
        _replace(file, text, "".join(kept), is_part=file != path)


def _replace(path: AnyPath, text: str, kept: str, *, is_part: bool) -> None:
    if is_part and not kept:
        path.unlink()
    elif kept != text:
        write_atomically(path, kept)


def _metrics_of(path: AnyPath, text: str) -> list[dict[str, Any]]:
    texts = text.splitlines()
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        elif number < len(texts):
            raise UserError(
                f"{path} line {number} is not a metrics line: {text[:60]!r}; mend or remove it"
            )
    return lines


def _read_files(path: AnyPath) -> list[tuple[AnyPath, str]]:
    """The texts of the file `path` and of its parts, in order, of those that are there."""
    found: dict[tuple[int, int], AnyPath] = {}
    for other in _siblings(path):
        if other.name == path.name:
            found[-1, 0] = path
        elif (number := _number_of(other.name, path)) is not None:
            found[number] = other
    paths = [found[number] for number in sorted(found)]

    def read(path: AnyPath) -> str | None:
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:  # the first process has just dropped it
            return None

    with ThreadPoolExecutor(_READERS) as readers:
        texts = list(readers.map(read, paths))
    return [(path, text) for path, text in zip(paths, texts, strict=True) if text is not None]


def _siblings(path: AnyPath) -> Iterable[AnyPath]:
    if isinstance(path, BucketPath):
        return path.parent.iterdir()
    return path.parent.iterdir() if path.parent.is_dir() else ()


def _number_of(name: str, path: AnyPath) -> tuple[int, int] | None:
    """Which part of the file `path` has this name: its number, and which of that number it is."""
    stem = path.name.removesuffix(".jsonl")
    match = re.fullmatch(re.escape(stem) + r"-(\d+)(?:\.(\d+))?\.jsonl", name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def _lines_file(path: AnyPath, first: int, upload_seconds: float) -> "_Appended | _Parts":
    if isinstance(path, BucketPath):
        return _Parts(path, first, upload_seconds)
    return _Appended(path)


class _Appended:
    """Lines that are appended to a local file, each as soon as it is there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def write(self, number: int, text: str) -> None:
        """Raises UserError where the disk does not take it, or takes a part of it."""
        try:
            if self._file is None:
                self._file = self._path.open("a", buffering=1, encoding="utf-8")
            self._file.write(text)
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written: {error.strerror}; mend that, then resume by the "
                "same command"
            ) from error

    def flush(self) -> None:
        """Nothing: each line is on its way to the disk when `write` returns."""

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what a failed write has left, which it told
                self._file.close()


class _Part:
    """One object of lines; they stay in memory until they are in the store."""

    def __init__(self, path: BucketPath) -> None:
        self.path = path
        self.texts: list[str] = []
        self.num_bytes = 0
        self.num_stored = 0  # of the texts


class _Parts:
    """Lines that are uploaded in the background, to parts that no earlier call has written."""

    def __init__(self, path: BucketPath, first: int, upload_seconds: float) -> None:
        self._path = path
        self._first: int | None = first
        self._taken = {other.name for other in path.parent.iterdir()}
        self._parts: list[_Part] = []  # the last is written, those before wait for their upload
        self._lock = threading.Lock()
        self._background = Background(self._upload, upload_seconds, what=f"uploading {path}")

    def write(self, number: int, text: str) -> None:
        with self._lock:
            if not self._parts or self._parts[-1].num_bytes >= _PART_BYTES:
                first = number if self._first is None else self._first
                self._parts.append(_Part(self._new_path(first)))
                self._first = None
            part = self._parts[-1]
            part.texts.append(text)
            part.num_bytes += len(text)

    def flush(self) -> None:
        if self._waiting():
            self._background.flush()

    def close(self) -> None:
        if not self._waiting():
            self._background.stop()
        elif not self._background.close():
            _log.warning("%s: %d lines are lost", self._path, self._waiting())

    def _waiting(self) -> int:
        """How many lines are not in the store yet."""
        with self._lock:
            return sum(len(part.texts) - part.num_stored for part in self._parts)

    def _upload(self) -> None:
        with self._lock:
            # Those before the last are complete, and leave memory when they are stored.
            while len(self._parts) > 1 and self._parts[0].num_stored == len(self._parts[0].texts):
                del self._parts[0]
            due = [
                (part, "".join(part.texts), len(part.texts))
                for part in self._parts
                if part.num_stored < len(part.texts)
            ]
        for part, text, num_texts in due:
            part.path.write_text(text)
            with self._lock:
                part.num_stored = num_texts

    def _new_path(self, number: int) -> BucketPath:
        stem = self._path.name.removesuffix(".jsonl")
        name, again = f"{stem}-{number:09d}.jsonl", 0
        while name in self._taken:  # a call that went on from the same step has left lines of it
            again += 1
            name = f"{stem}-{number:09d}.{again}.jsonl"
        self._taken.add(name)
        return self._path.parent / name
