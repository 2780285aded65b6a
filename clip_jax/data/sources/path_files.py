"""Whole files by their path: the images that tables and folders name."""

import itertools
import os
from collections.abc import Sequence
from typing import Any, overload

from clip_jax.data.record import BadSampleError
from clip_jax.data.sources.files import Files, is_remote

# An image of 20,000 x 20,000 pixels takes as much uncompressed; what is larger is no image.
_MAX_BYTES = 3 * 400_000_000


class PathFiles:
    """Reads whole files, local or remote, with the retries of `Files`.

    Picklable; threads may share it.
    """

    def __init__(self, retries: int = 3) -> None:
        self._retries = retries
        self._prepare()

    def read(self, path: str) -> bytes:
        """Raises BadSampleError: "read" if the file cannot be had, "image" if it is too large."""
        number = next(self._numbers)
        self._paths[number] = path
        try:
            num_bytes = self._files.size(number)
            if num_bytes > _MAX_BYTES:
                raise BadSampleError("image", f"{path}: {num_bytes} bytes, too large for an image")
            return self._files.read(number, 0, num_bytes)
        finally:
            del self._paths[number]

    def __getstate__(self) -> dict[str, Any]:
        return {"_retries": self._retries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def _prepare(self) -> None:
        self._numbers = itertools.count()
        self._paths = _Paths()
        self._files = Files(self._paths, self._retries, max_open=1)


class _Paths(Sequence[str]):
    """The paths that are being read at the moment, by a number: `Files` knows files by numbers."""

    def __init__(self) -> None:
        self._current: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._current)

    @overload
    def __getitem__(self, number: int) -> str: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[str]: ...

    def __getitem__(self, number: int | slice) -> str | Sequence[str]:
        assert isinstance(number, int)
        return self._current[number]

    def __setitem__(self, number: int, path: str) -> None:
        self._current[number] = path

    def __delitem__(self, number: int) -> None:
        del self._current[number]


def folder_of(path: str) -> str:
    """The folder of a local or remote file."""
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(os.path.abspath(path))


def resolve(folder: str, path: str) -> str:
    """A path as a table beside it means it: relative to the table's folder."""
    if is_remote(path) or os.path.isabs(path):
        return path
    return f"{folder}/{path}" if is_remote(folder) else os.path.join(folder, path)
