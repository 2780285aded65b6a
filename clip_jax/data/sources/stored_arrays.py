"""Files of an index, written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray


@contextmanager
def replacing(file: Path) -> Iterator[IO[bytes]]:
    """Write a file whole or not at all: processes may build the same index at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".index-")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def write_header(stream: IO[bytes], dtype: np.dtype, length: int) -> None:
    """Write the header of an .npy file of one dimension; it is as long for any length."""
    np.lib.format.write_array_header_1_0(
        stream,
        {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)},
    )


class StoredArray:
    """An array in a raw file, mapped into memory where it is first read; pickles to its name."""

    def __init__(self, file: Path, dtype: str | list[tuple[str, str]]) -> None:
        self._file = file
        self._dtype = dtype
        self._array: NDArray | None = None

    def __call__(self) -> NDArray:
        """The array [n]."""
        if self._array is None:  # threads may both map it: either map will do
            empty = self._file.stat().st_size == 0  # cannot be mapped
            dtype = np.dtype(self._dtype)
            self._array = np.empty(0, dtype) if empty else np.memmap(self._file, dtype, "r")
        return self._array

    def __reduce__(self) -> tuple[type["StoredArray"], tuple[Path, str | list[tuple[str, str]]]]:
        return StoredArray, (self._file, self._dtype)
