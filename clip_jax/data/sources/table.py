"""Tables of image paths and captions: CSV, TSV and JSONL files."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError, Record
from clip_jax.data.sources.caption_values import (
    Captions,
    captions_of_values,
    check_captions,
    find_column,
    nested_value,
)
from clip_jax.data.sources.files import Files
from clip_jax.data.sources.path_files import PathFiles, folder_of, resolve
from clip_jax.data.sources.table_rows import index_rows, row_end, split_row
from clip_jax.data.sources.tar_paths import expand_path

IMAGE_COLUMNS = ("filepath", "image_path", "file_name", "filename", "path", "image", "file")
CAPTION_COLUMNS = ("caption", "captions", "text", "title")
_JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
_PACKED_ENDINGS = (".gz", ".zst", ".bz2", ".xz", ".zip")
_BOM = b"\xef\xbb\xbf"
_HEAD = 2**18  # bytes: a header and, of JSONL, the first rows
_HEAD_ROWS = 100
_MAX_ROW = 64 * 2**20  # bytes
_THREADS = 16  # more than cores: they wait for the storage


class _Layout(NamedTuple):
    """Where a file has what is asked for. The delimiter of JSONL is None, and it has no numbers."""

    delimiter: bytes | None
    image_key: str
    caption_keys: tuple[str, ...]
    num_columns: int = 0
    image: int = 0
    captions: tuple[int, ...] = ()


class TableSource:
    """The rows of some tables, each an image's path and its captions.

    path: files, see `expand_path`, whose endings tell what they are: .jsonl (ndjson) has an object
    on each line; anything else is CSV, with a header that names the columns; its delimiter is a tab
    where the header has one, else a comma. Text is UTF-8. index_dir: where the index is kept.

    image_key: the column of the image's path, or URL; "": the first of `filepath`, `image_path`,
    `file_name`, `filename`, `path`, `image`, `file`. Paths are relative to the table's folder.
    caption_keys: the columns of captions, in JSONL also lists and `nested.keys`; (): the first of
    `caption`, `captions`, `text`, `title`. caption_weights: see `captions_of_values`.

    Reads a row and its image by 8 bytes of index a row, mapped into memory. Pickles to its paths;
    threads may share it. Raises UserError for files that are missing or empty, columns that are not
    there, and where the first rows have no caption.
    """

    def __init__(
        self,
        path: str,
        index_dir: Path,
        *,
        image_key: str = "",
        caption_keys: Sequence[str] = (),
        caption_weights: Sequence[float] = (),
        retries: int = 3,
    ) -> None:
        self._paths = expand_path(path)
        self._files = Files(self._paths, retries)
        self._images = PathFiles(retries)
        self._weights = tuple(caption_weights)
        numbers = range(len(self._paths))

        def layout(number: int) -> _Layout:
            head = self._files.read(number, 0, _HEAD)
            return _layout(head, self._paths[number], image_key, tuple(caption_keys))

        try:
            with ThreadPoolExecutor(min(_THREADS, len(numbers))) as pool:
                infos = list(pool.map(self._files.info, numbers))
                self._layouts = list(pool.map(layout, numbers))
            delimiters = [layout.delimiter for layout in self._layouts]
            self._starts, counts = index_rows(self._paths, infos, delimiters, index_dir, retries)
        except BadSampleError as error:
            raise UserError(f"{path}: {error}") from None
        self._sizes = [info.num_bytes for info in infos]
        self._ends = np.cumsum(counts)
        check_captions(self, path)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        """Read a row and its image. Raises IndexError and BadSampleError."""
        file, row = self._place(index)
        image, captions = self._row(index)
        if not isinstance(image, str) or not image.strip():
            column = self._layouts[file].image_key
            raise BadSampleError("archive", f"no image path in column '{column}'")
        data = self._images.read(resolve(folder_of(self._paths[file]), image.strip()))
        return Record(data, captions[0], str(row), captions[1])

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a row. Raises as reading it does."""
        return self._row(index)[1][0]

    def shard(self, index: int) -> str:
        """The table that holds a row."""
        return self._paths[self._place(index)[0]]

    def locate(self, index: int) -> str:
        """A row's table and its number in it, from 0 after the header."""
        file, row = self._place(index)
        return f"{self._paths[file]}, row {row}"

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - (int(self._ends[file - 1]) if file else 0)

    def _row(self, index: int) -> tuple[object, Captions]:
        """The image's path and the captions of a row."""
        file, _ = self._place(index)
        starts = self._starts()
        start = int(starts[index])
        is_last = index + 1 == self._ends[file]
        end = self._sizes[file] if is_last else int(starts[index + 1])
        if end - start > _MAX_ROW:
            raise BadSampleError("archive", f"a row of {end - start} bytes")
        data = self._files.read(file, start, end - start)
        if len(data) < end - start:
            raise BadSampleError("archive", "the file is shorter than when it was indexed")
        layout = self._layouts[file]
        values: Sequence[object]
        if layout.delimiter is None:
            content = _json_row(data)
            values = [
                nested_value(content, key) for key in (layout.image_key, *layout.caption_keys)
            ]
        else:
            values = _csv_row(data, layout)
        return values[0], captions_of_values(values[1:], layout.caption_keys, self._weights)


def _layout(head: bytes, path: str, image_key: str, caption_keys: tuple[str, ...]) -> _Layout:
    if path.lower().endswith(_PACKED_ENDINGS):
        raise UserError(f"{path}: a packed table cannot be read at random; unpack it first")
    if not head.strip():
        raise UserError(f"{path}: the file is empty")
    if b"\0" in head:
        raise UserError(f"{path}: no UTF-8 text (zero bytes); save it as UTF-8")
    delimiter = None
    if path.lower().endswith(_JSON_ENDINGS):
        names = _json_names(head, path)
    else:
        head = head.removeprefix(_BOM).lstrip(b"\r\n")
        delimiter = b"\t" if b"\t" in head.partition(b"\n")[0] else b","
        end = row_end(head + b"\n", 0, delimiter)
        if end is None or end > _HEAD:
            raise UserError(f"{path}: no header within the first {_HEAD} bytes")
        fields = split_row(head[:end].rstrip(b"\r\n"), delimiter)
        names = [field.decode(errors="replace").strip() for field in fields]
    image = find_column(image_key, IMAGE_COLUMNS, names, path=path, setting="image_key")
    captions = tuple(
        find_column(key, CAPTION_COLUMNS, names, path=path, setting="caption_keys")
        for key in caption_keys or ("",)
    )
    if delimiter is None:
        return _Layout(None, image, captions)
    for name in (image, *captions):
        if name not in names:  # `nested.keys` are for JSONL
            raise UserError(f"{path}: no column '{name}'; there are: {', '.join(names)}")
    numbers = tuple(names.index(name) for name in captions)
    return _Layout(delimiter, image, captions, len(names), names.index(image), numbers)


def _json_names(head: bytes, path: str) -> list[str]:
    """The keys of the first rows' objects."""
    lines = head.split(b"\n")
    if len(head) == _HEAD and len(lines) > 1:
        lines.pop()  # cut short
    names: dict[str, None] = {}
    problem = "no object in it"
    for line in [line for line in lines if line.strip()][:_HEAD_ROWS]:
        try:
            names |= dict.fromkeys(_json_row(line))
        except BadSampleError as error:
            problem = str(error)
    if not names:
        raise UserError(f"{path}: no JSONL, an object on each line: {problem}")
    return list(names)


def _json_row(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line.strip().removeprefix(_BOM))
    except (ValueError, RecursionError) as error:  # ValueError: UnicodeDecodeError too
        message = " ".join(str(error).split())[:200]
        raise BadSampleError("archive", f"the line is no JSON: {message}") from None
    if not isinstance(content, dict):
        raise BadSampleError("archive", "the line is no JSON object")
    return content


def _csv_row(data: bytes, layout: _Layout) -> list[str | bytes | None]:
    """The image's path and the captions' bytes."""
    assert layout.delimiter is not None
    fields = split_row(data.rstrip(b"\r\n"), layout.delimiter)
    if len(fields) > layout.num_columns and any(fields[layout.num_columns :]):
        raise BadSampleError(
            "archive",
            f"{len(fields)} fields in a row, {layout.num_columns} columns in the header; "
            "fields that hold the delimiter must be quoted",
        )
    fields += [b""] * (layout.num_columns - len(fields))
    return [os.fsdecode(fields[layout.image]), *(fields[number] for number in layout.captions)]
