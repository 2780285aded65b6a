"""Random access to webdataset tars: an index of offsets and `os.pread`."""

import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_jax.config.errors import UserError
from clip_jax.data.record import Record
from clip_jax.data.sources.tar_headers import TarError, first_member
from clip_jax.data.sources.tar_index import build_indexes, split_name
from clip_jax.data.sources.tar_paths import expand_path

logger = logging.getLogger(__name__)

# A process may have 1,024 files open by default, other libraries' included.
_MAX_OPEN_TARS = 256


class WebdatasetSource:
    """The samples of some webdataset tars, in the order of the path and of the archives.

    path: tar files; see `expand_path`. index_dir: where their indexes are kept.

    A sample needs one image (jpg, jpeg, png, webp) and a caption: a `txt` member is one caption, a
    `json` member may hold `caption` (text) or `captions` (list). Where both exist the `txt` comes
    first and equal captions count once. Samples without the members are left out and counted.

    Pickles to its paths and counts; files are opened where they are first read. Threads may share
    it. Raises UserError for paths that match nothing, damaged tars and tars without any sample.
    """

    def __init__(self, path: str, index_dir: Path) -> None:
        self.path = path
        self._tars = expand_path(path)
        index = build_indexes(self._tars, index_dir)
        self.num_skipped = index.num_skipped  # samples without image or caption
        self._rows_file = index.rows_file
        self._ends = np.cumsum(index.counts)
        if self.num_skipped:
            logger.warning(
                "%s: %d samples without image or caption left out, %d kept",
                path,
                self.num_skipped,
                len(self),
            )
        if len(self) == 0:
            raise UserError(
                f"{path}: no sample in {len(self._tars)} tars ({self.num_skipped} without image or "
                "caption); a sample is NAME.jpg (jpeg, png, webp) and NAME.txt or NAME.json"
            )
        self._forget_open_files()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        """Read one sample. Raises IndexError, and ValueError if it holds no usable caption."""
        tar, row = self._locate(index)
        start, text_start, json_start, length, text_length, json_length = row
        file = self._files.get(tar)
        name, image = _read_member(file, start, length)
        parts = split_name(name)
        if parts is None:
            raise ValueError(f"{self._tars[tar]}: changed since it was indexed (byte {start})")
        captions: list[str] = []
        if text_length:
            _, text = _read_member(file, text_start, text_length)
            captions.append(text.decode("utf-8", errors="replace"))
        if json_length:
            _, text = _read_member(file, json_start, json_length)
            captions.extend(_json_captions(text))
        unique = dict.fromkeys(stripped for caption in captions if (stripped := caption.strip()))
        if not unique:
            raise ValueError("no caption: the txt is empty and the json has no 'caption'")
        return Record(image, tuple(unique), parts[0].decode("utf-8", errors="replace"))

    def locate(self, index: int) -> str:
        """Name a sample for messages: its tar and key. Works where the sample itself is broken."""
        tar, row = self._locate(index)
        try:
            name, _ = _read_member(self._files.get(tar), row[0], row[3])
        except (OSError, ValueError) as error:
            return f"{self._tars[tar]}, byte {row[0]} ({error})"
        parts = split_name(name) or (name, b"")
        return f"{self._tars[tar]}, key {parts[0].decode('utf-8', errors='replace')}"

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_files"], state["_rows"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_open_files()

    def _forget_open_files(self) -> None:
        self._files = _FileCache(self._tars, _MAX_OPEN_TARS)
        self._rows: NDArray[np.void] | None = None

    def _locate(self, index: int) -> tuple[int, tuple[int, int, int, int, int, int]]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        if self._rows is None:  # threads may both map it: either map will do
            self._rows = np.load(self._rows_file, mmap_mode="r")
        return int(np.searchsorted(self._ends, index, side="right")), self._rows[index].item()


class _File:
    """An open file that closes with its last reference.

    A thread that still reads from an evicted file must hold on to the object: were the file closed
    under it, the descriptor could by then belong to another file.
    """

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def pread(self, num_bytes: int, offset: int) -> bytes:
        return os.pread(self._descriptor, num_bytes, offset)


class _FileCache:
    """The files last read, up to `size`; safe to share between threads."""

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self._paths = paths
        self._size = size
        self._open: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int) -> _File:
        with self._lock:
            file = self._open.get(number)
            if file is not None:
                self._open.move_to_end(number)
                return file
        file = _File(self._paths[number])  # not locked: opening may wait for a network disk
        with self._lock:
            file = self._open.setdefault(number, file)
            if len(self._open) > self._size:
                self._open.popitem(last=False)
        return file


def _read_member(file: _File, start: int, length: int) -> tuple[bytes, bytes]:
    """Read a member's name and data. Raises ValueError where the tar is not as it was indexed."""
    buffer = file.pread(length, start)
    try:
        member = first_member(buffer)
    except TarError as error:
        raise ValueError(f"{error.reason} (was the tar changed while in use?)") from None
    return member.name, buffer[member.data : member.data + member.size]


def _json_captions(text: bytes) -> list[str]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the json does not parse: {error}") from None
    if not isinstance(content, dict):
        return []
    captions = content.get("captions")
    candidates = captions if isinstance(captions, list) else [content.get("caption")]
    return [caption for caption in candidates if isinstance(caption, str)]
