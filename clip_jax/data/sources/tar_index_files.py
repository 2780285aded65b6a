"""The index file of one tar, in the cache folder or beside the tar.

Two arrays of the .npy format, one after the other: a head, which holds the size and the version
(time or ETag) of the tar that was scanned, and the rows of its samples (see `tar_scan.ROW`).
"""

import hashlib
import io
import logging
import math
import os
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError
from clip_jax.data.sources.files import FileInfo, Files, is_remote, one_line, remote_filesystem
from clip_jax.data.sources.stored_arrays import replacing
from clip_jax.data.sources.tar_scan import NUM_FIELDS, TarScan
from clip_jax.data.sources.tar_versions import UNKNOWN

logger = logging.getLogger(__name__)

BESIDE = ".index.npy"  # what an index adds to its tar's name where it lies beside it
_VERSION = 2  # of the files and of the scan
HEAD = np.dtype(
    [
        ("version", "<u4"),
        ("num_bytes", "<i8"),  # of the tar, as is the tag
        ("tag", "S96"),
        ("num_samples", "<i8"),
        ("num_skipped", "<i8"),
        ("damage", "S240"),
    ]
)
_HEAD_BYTES = 512  # at least: of the head with its .npy header


class TarIndex(NamedTuple):
    """What an index file holds."""

    head: np.void  # HEAD
    rows: NDArray[np.uint32]  # [n, 10]


def index_file(path: str, index_dir: Path) -> Path:
    """Where the index of the tar at `path` is kept."""
    identity = f"{_VERSION}\0{absolute(path)}".encode(errors="surrogateescape")
    return index_dir / f"{hashlib.sha256(identity).hexdigest()[:32]}.npy"


def absolute(path: str) -> str:
    return path if is_remote(path) else os.path.abspath(path)


def fits(head: np.void, version: FileInfo | None, beside: bool = False) -> bool:
    """Whether an index is of this version of its tar; one of a tar that has gone is kept.

    beside: it lies beside the tar. In a bucket then the size alone tells, as the tag is of the disk
    that both were uploaded from.
    """
    if head["version"] != _VERSION:
        return False
    if version is None or version == UNKNOWN:
        return True
    if head["num_bytes"] != version.num_bytes:
        return False
    if beside and not version.tag.startswith("mtime_ns:"):
        return True
    return bool(head["tag"] == _cut(version.tag, "tag"))


def of_scan(scanned: TarScan, version: FileInfo) -> TarIndex:
    """The index of a tar whose version before the scan was `version`."""
    head: np.void = np.zeros(1, HEAD)[0]
    head["version"] = _VERSION
    head["num_bytes"] = version.num_bytes
    head["tag"] = _cut(version.tag, "tag")
    head["num_samples"] = len(scanned.rows)
    head["num_skipped"] = scanned.num_skipped
    head["damage"] = _cut(scanned.damage, "damage")
    return TarIndex(head, scanned.rows)


def with_version(index: TarIndex, version: FileInfo) -> TarIndex:
    """The index with the tag of the place that its tar was found at."""
    head = index.head.copy()
    head["tag"] = _cut(version.tag, "tag")
    return TarIndex(head, index.rows)


def save(file: Path, index: TarIndex) -> None:
    with replacing(file) as stream:
        _write(stream, index)


def load(file: Path) -> TarIndex | None:
    """Read an index file; None where there is none, or it is damaged."""
    try:
        with file.open("rb") as stream:
            return _read(stream, str(file))
    except FileNotFoundError:
        return None


def load_head(file: Path) -> np.void | None:
    """Read the head of an index file; None where there is none, or it is damaged."""
    try:
        with file.open("rb") as stream:
            return _read_head(stream, str(file))
    except FileNotFoundError:
        return None


def load_beside(path: str, retries: int) -> TarIndex | None:
    """Read the index that lies beside a tar; None where there is none, or it is damaged."""
    name = path + BESIDE
    files = Files([name], retries, max_open=1)
    try:
        content = files.read(0, 0, files.size(0))
    except BadSampleError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            logger.warning("not read, the tar is scanned instead: %s", error)
        return None
    return _read(io.BytesIO(content), name)


def write_beside(path: str, index: TarIndex, retries: int) -> None:
    """Put an index beside its tar, unless it lies there. Raises UserError where that fails."""
    name = path + BESIDE
    files = Files([name], retries, max_open=1)
    try:
        start = _read_head(io.BytesIO(files.read(0, 0, _HEAD_BYTES + HEAD.itemsize)), name)
        if start is not None and start == index.head:
            return
    except BadSampleError:  # not there, or not to be read: it is written
        pass
    content = io.BytesIO()
    _write(content, index)
    try:
        if is_remote(name):
            remote_filesystem(name).pipe_file(name, content.getvalue())
        else:
            with replacing(Path(name)) as stream:
                stream.write(content.getvalue())
    except Exception as error:  # each store has its own tree of errors
        raise UserError(
            f"{name} cannot be written: {one_line(error)}; keep indexes in the cache folder alone"
        ) from error


def _cut(text: str, field: str) -> bytes:
    return text.encode(errors="replace")[: HEAD[field].itemsize]


def _write(stream: IO[bytes], index: TarIndex) -> None:
    np.save(stream, np.array([index.head], HEAD))
    np.save(stream, index.rows)


def _read(stream: IO[bytes], name: str) -> TarIndex | None:
    head = _read_head(stream, name)
    rows = None
    if head is not None:
        rows = read_array(stream, np.dtype("<u4"), (int(head["num_samples"]), NUM_FIELDS), name)
    return None if head is None or rows is None else TarIndex(head, rows)


def _read_head(stream: IO[bytes], name: str) -> np.void | None:
    heads = read_array(stream, HEAD, (1,), name)
    return None if heads is None else heads[0]


def read_array(
    stream: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...], name: str
) -> NDArray[Any] | None:
    """Read an array of the .npy format; None, and a warning, where this is not what is there.

    Compares with the only header that fits: numpy's parser raises whatever on a damaged one.
    """
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header,
        {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": shape,
        },
    )
    num_bytes = dtype.itemsize * math.prod(shape)
    if stream.read(len(header.getvalue())) == header.getvalue():
        content = stream.read(num_bytes)
        if len(content) == num_bytes:
            return np.frombuffer(content, dtype).reshape(shape)
    logger.warning("%s is damaged or of another version, and made anew", name)
    return None
