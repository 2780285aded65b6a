"""The index of a webdataset tar: where each sample's members lie.

One `.npy` file per tar, named by a hash of the tar's path, size and modification time, so a tar
that changes gets a new index and one that stays is never scanned again; and one per list of tars,
joined from these, which is what a source maps into memory.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_jax.config.errors import UserError
from clip_jax.data.sources.tar_headers import Member, TarError, walk

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset({b"jpg", b"jpeg", b"png", b"webp"})
# Starts and lengths in bytes; each stretch holds a member's headers and its data. Length 0: the
# sample has no such member. 36 bytes a sample.
INDEX_DTYPE = np.dtype(
    [
        ("image_start", "<i8"),
        ("text_start", "<i8"),
        ("json_start", "<i8"),
        ("image_bytes", "<u4"),
        ("text_bytes", "<u4"),
        ("json_bytes", "<u4"),
    ]
)
_VERSION = 1  # of the format and of the scan: part of the hash
_WINDOW = 4096  # bytes per read: a caption, its header and the next header mostly fit in one
# More threads than cores: on network storage a scan waits for the disk, not for the processor.
_SCAN_THREADS = 8


@dataclass(slots=True)
class _Sample:
    """The members seen so far of one sample: extension kind -> (start, length)."""

    key: bytes
    extensions: set[bytes] = field(default_factory=set)
    image: tuple[int, int] = (0, 0)
    text: tuple[int, int] = (0, 0)
    json: tuple[int, int] = (0, 0)

    def add(self, extension: bytes, member: Member) -> None:
        if extension in self.extensions:
            raise TarError(member.start, f"the name {member.name.decode(errors='replace')} twice")
        self.extensions.add(extension)
        stretch = (member.start, member.data + member.size - member.start)
        if stretch[1] >= 2**32:  # no picture; the index has 32 bits for it
            return
        if extension in IMAGE_EXTENSIONS:
            self.image = self.image if self.image[1] else stretch
        elif extension == b"txt":
            self.text = stretch
        elif extension == b"json":
            self.json = stretch

    def row(self) -> tuple[int, int, int, int, int, int] | None:
        """The sample's row in the index, or None where it lacks an image or a caption."""
        if not self.image[1] or not (self.text[1] or self.json[1]):
            return None
        starts, lengths = zip(self.image, self.text, self.json, strict=True)
        return (*starts, *lengths)


def split_name(name: bytes) -> tuple[bytes, bytes] | None:
    """Split a member name into key and lower-case extension as webdataset does, or return None.

    The key is all up to the first dot of the last path component; a name without extension, a
    hidden file (`._001.jpg`) and a meta file (`__meta__.json`) belong to no sample.
    """
    directory, slash, base = name.rpartition(b"/")
    stem, dot, extension = base.partition(b".")
    if not dot or not stem or (stem[:2] == b"__" and stem[-2:] == b"__"):
        return None
    return directory + slash + stem, extension.lower()


def scan(path: str) -> tuple[NDArray[np.void], int]:
    """Scan a tar's headers. Return its index rows [n] and the number of samples left out of it.

    Raises UserError naming the file, the offset and the whole samples before it if the archive is
    damaged, cut short or compressed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    rows: list[tuple[int, int, int, int, int, int]] = []
    skipped = 0
    sample = _Sample(b"")
    members = walk(_WindowedReader(descriptor), os.fstat(descriptor).st_size)
    try:
        for member in _warn_without_end(members, path):
            parts = split_name(member.name)
            if parts is None:
                continue
            if parts[0] != sample.key:
                row = sample.row()
                if row is not None:
                    rows.append(row)
                elif sample.extensions:
                    skipped += 1
                sample = _Sample(parts[0])
            sample.add(parts[1], member)
    except TarError as error:
        whole = len(rows) + (sample.row() is not None)
        raise UserError(
            f"{path}: {error.reason} at byte {error.offset}, after {whole} whole samples; "
            "fetch or write this tar again, or leave it out of the path"
        ) from None
    finally:
        os.close(descriptor)
    row = sample.row()
    if row is not None:
        rows.append(row)
    elif sample.extensions:
        skipped += 1
    return np.array(rows, dtype=INDEX_DTYPE), skipped


def index_file(path: str, index_dir: Path) -> Path:
    """Where the index of the tar at `path` is kept. Raises FileNotFoundError without the tar."""
    absolute = os.path.abspath(path)
    stat = os.stat(absolute)
    identity = f"{_VERSION}\0{absolute}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return (
        index_dir
        / f"{hashlib.sha256(identity.encode(errors='surrogateescape')).hexdigest()[:32]}.npy"
    )


class SetIndex(NamedTuple):
    """The index of a list of tars: one file of rows, so that it costs a process one descriptor."""

    rows_file: Path  # .npy, INDEX_DTYPE [n], the tars' rows one after another
    counts: NDArray[np.int64]  # samples of each tar
    num_skipped: int  # samples without image or caption


def build_indexes(paths: Sequence[str], index_dir: Path) -> SetIndex:
    """Index a list of tars, scanning only those that were not scanned before.

    Raises UserError for a damaged tar.
    """
    files = [index_file(path, index_dir) for path in paths]
    identity = hashlib.sha256("".join(file.name for file in files).encode()).hexdigest()[:32]
    rows_file = index_dir / f"set-{identity}.npy"
    counts_file = index_dir / f"set-{identity}-counts.npy"
    if not rows_file.exists():
        missing = {file: path for file, path in zip(files, paths, strict=True) if not file.exists()}
        if missing:
            logger.info("indexing %d of %d tars into %s", len(missing), len(paths), index_dir)
            index_dir.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(min(_SCAN_THREADS, len(missing))) as pool:
                list(pool.map(_build, missing.values(), missing.keys()))
        _join(files, rows_file, counts_file)
    counts = np.load(counts_file)
    return SetIndex(rows_file, counts[:, 0], int(counts[:, 1].sum()))


def _build(path: str, file: Path) -> None:
    rows, skipped = scan(path)
    # Row 0 holds the count of samples left out: an .npy file can be mapped, an .npz cannot.
    stored = np.zeros(len(rows) + 1, INDEX_DTYPE)
    stored[1:] = rows
    stored["image_start"][0] = skipped
    with _replacing(file) as temporary:
        np.save(temporary, stored)


def _join(files: Sequence[Path], rows_file: Path, counts_file: Path) -> None:
    parts = [np.load(file, mmap_mode="r") for file in files]
    counts = np.array([(len(part) - 1, part["image_start"][0]) for part in parts], np.int64)
    with _replacing(counts_file) as temporary:
        np.save(temporary, counts)
    with _replacing(rows_file) as temporary:
        np.lib.format.write_array_header_1_0(
            temporary,
            {
                "descr": INDEX_DTYPE.descr,
                "fortran_order": False,
                "shape": (int(counts[:, 0].sum()),),
            },
        )
        for part in parts:
            temporary.write(part[1:].tobytes())


@contextmanager
def _replacing(file: Path) -> Iterator[IO[bytes]]:
    """Write a file whole or not at all: processes may build the same index at the same time."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".index-")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def _warn_without_end(
    members: Generator[Member, None, bool], path: str
) -> Generator[Member, None, None]:
    if not (yield from members):
        logger.warning("%s: no end marker; was its writer stopped early?", path)


class _WindowedReader:
    """A `pread(num_bytes, offset)` that reads ahead a little: fewer system calls."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._window = b""
        self._start = 0

    def __call__(self, num_bytes: int, offset: int) -> bytes:
        position = offset - self._start
        if not 0 <= position <= len(self._window) - num_bytes:
            self._window = os.pread(self._descriptor, max(_WINDOW, num_bytes), offset)
            self._start = offset
            position = 0
        return self._window[position : position + num_bytes]
