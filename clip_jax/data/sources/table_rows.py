"""Where the rows of CSV, TSV and JSONL files begin, and their fields.

The dialect is that of Python's `csv` and of pandas: a field that begins with a quote ends at the
next one that is not doubled and may hold delimiters and newlines; other quotes are plain text. A
quoted field that goes on for a mebibyte has lost its end: its row is then the one damaged line.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError
from clip_jax.data.sources.files import FileInfo, SequentialFile, open_sequential
from clip_jax.data.sources.stored_arrays import StoredArray, replacing

_VERSION = 1  # of the index and of the scan: part of the hash
_BLOCK = 8 * 2**20
_MAX_QUOTED = 2**20  # bytes of a row with quoted newlines
_MAX_LINE = 64 * 2**20
_QUOTE, _NEWLINE, _RETURN = b'"\n\r'


def index_rows(
    paths: Sequence[str],
    infos: Sequence[FileInfo],
    delimiters: Sequence[bytes | None],
    index_dir: Path,
    retries: int = 3,
) -> tuple[StoredArray, NDArray[np.int64]]:
    """Find the rows of some tables, once for each version of the files.

    delimiters: of each file's fields; None: lines are rows, without a header.

    Return the rows' first bytes, int64 [n], one file's after another's, and the number of rows of
    each file. Blank lines and headers are no rows. Raises UserError for a file
    without lines, BadSampleError("read") where one cannot be read.
    """
    identity = hashlib.sha256(f"{_VERSION}".encode())
    for path, info, delimiter in zip(paths, infos, delimiters, strict=True):
        identity.update(f"\0{path}\0{info}\0{delimiter!r}".encode(errors="surrogateescape"))
    rows_file = index_dir / f"rows-{identity.hexdigest()[:32]}"
    counts_file = rows_file.with_name(f"{rows_file.name}-counts.npy")
    if not counts_file.exists():
        counts = np.zeros(len(paths), np.int64)
        with replacing(rows_file) as stream:
            for number, (path, delimiter) in enumerate(zip(paths, delimiters, strict=True)):
                with open_sequential(path, 0, retries) as file:
                    skipped = 0 if delimiter is None else 1  # the header
                    for starts in row_starts(file, delimiter, path):
                        stream.write(starts[skipped:].astype("<i8").tobytes())
                        counts[number] += len(starts[skipped:])
                        skipped = max(0, skipped - len(starts))
        # Written last: where it is there, the rows are too.
        with replacing(counts_file) as stream:
            np.save(stream, counts)
    return StoredArray(rows_file, "<i8"), np.load(counts_file)


def row_starts(
    file: SequentialFile, delimiter: bytes | None, path: str
) -> Iterator[NDArray[np.int64]]:
    """First bytes of all rows that are not blank, in parts. Raises UserError for endless lines."""
    data, offset, is_last = b"", 0, False
    while not is_last:
        block = file.read(_BLOCK)
        is_last = len(block) < _BLOCK
        data += block
        if is_last and not data.endswith(b"\n"):
            data += b"\n"
        starts, used = _rows(data, delimiter, is_last)
        if not used and len(data) > _MAX_LINE:
            raise UserError(
                f"{path}: no end of line within {_MAX_LINE >> 20} MiB of byte {offset}; "
                "is it a text file?"
            )
        yield starts + offset
        data = data[used:]
        offset += used


def _rows(data: bytes, delimiter: bytes | None, is_last: bool) -> tuple[NDArray[np.int64], int]:
    """First bytes of the rows in `data`, which begins with one, and the bytes that they take."""
    array = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(array == _NEWLINE) + 1
    if len(ends) == 0:
        return np.empty(0, np.int64), 0
    starts = np.concatenate([[0], ends[:-1]])
    lengths = ends - starts
    is_row = (lengths > 2) | ((lengths == 2) & (array[starts] != _RETURN))
    used = int(ends[-1])
    if delimiter is None or _QUOTE not in data:
        return starts[is_row], used
    next_row = 0
    for line in _unclear_lines(array, ends, delimiter[0]):
        if line >= len(ends):
            break
        start = int(starts[line])
        if start < next_row:  # within a quoted field
            continue
        end = row_end(data, start, delimiter)
        if end is None and not is_last and len(data) - start <= _MAX_QUOTED:
            is_row[line:] = False  # goes on in the next block
            used = start
            break
        if end is not None and end - start <= _MAX_QUOTED:
            next_row = end
            is_row[line + 1 : np.searchsorted(ends, end) + 1] = False
    return starts[is_row], used


def _unclear_lines(array: NDArray[np.uint8], ends: NDArray[np.int64], delimiter: int) -> list[int]:
    """The lines that may end within a quoted field, were they to begin outside of one.

    A quote opens a field only at its beginning: after a delimiter or a newline. Lines without one
    are clear; so are those whose quotes are even in number and where each first of a pair opens a
    field, or is the second of a doubled quote.
    """
    quotes = np.flatnonzero(array == _QUOTE)
    lines = np.searchsorted(ends, quotes, side="right")
    before = array[np.maximum(quotes - 1, 0)]
    opens = (quotes == 0) | (before == _NEWLINE) | (before == delimiter)
    is_first_of_pair = (np.arange(len(quotes)) - np.searchsorted(lines, lines)) % 2 == 0
    stray = is_first_of_pair & ~opens & (before != _QUOTE)
    num_lines = len(ends) + 1
    unclear = np.bincount(lines[stray], minlength=num_lines) > 0
    unclear |= np.bincount(lines, minlength=num_lines) % 2 == 1
    unclear &= np.bincount(lines[opens], minlength=num_lines) > 0
    found: list[int] = np.flatnonzero(unclear).tolist()
    return found


def row_end(data: bytes, start: int, delimiter: bytes) -> int | None:
    """Where the row at `start` ends, its newline included; None: not within `data`."""
    position = start
    while True:
        if data[position : position + 1] == b'"':
            position = _closing_quote(data, position, start + _MAX_QUOTED) + 1
            if position == 0:
                return None
        newline = data.find(b"\n", position)
        if newline < 0:
            return None
        position = data.find(delimiter, position, newline) + 1
        if position == 0:
            return newline + 1


def split_row(row: bytes, delimiter: bytes) -> list[bytes]:
    """The fields of a row without its newline. Raises BadSampleError for a quote left open."""
    if _QUOTE not in row:
        return row.split(delimiter)
    fields = []
    position = 0
    while True:
        field = b""
        if row[position : position + 1] == b'"':
            close = _closing_quote(row, position, len(row))
            if close < 0:
                raise BadSampleError("archive", "a quoted field that does not end")
            field = row[position + 1 : close].replace(b'""', b'"')
            position = close + 1
        end = row.find(delimiter, position)
        if end < 0:
            fields.append(field + row[position:])
            return fields
        fields.append(field + row[position:end])
        position = end + 1


def _closing_quote(data: bytes, opening: int, limit: int) -> int:
    """Where the quoted field that begins at `opening` ends, or -1."""
    close = data.find(b'"', opening + 1, limit)
    while close >= 0 and data[close + 1 : close + 2] == b'"':
        close = data.find(b'"', close + 2, limit)
    return close
