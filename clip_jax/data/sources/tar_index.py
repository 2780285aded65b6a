"""Indexes of webdataset tars: built once, in parallel, kept in files.

Each tar has an index file, named by a hash of its path: a tar that changed is scanned again, one
that has gone keeps its rows. It is written as soon as its tar is scanned, so that a build that was
stopped goes on where it was. A list of tars has two files more: a table of the tars' heads, and
their rows, joined, which is what a source reads.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError
from clip_jax.data.sources.files import FileInfo, is_remote
from clip_jax.data.sources.stored_arrays import replacing, write_header
from clip_jax.data.sources.tar_index_files import (
    HEAD,
    absolute,
    fits,
    index_file,
    load,
    load_beside,
    load_head,
    of_scan,
    read_array,
    save,
    with_version,
    write_beside,
)
from clip_jax.data.sources.tar_paths import expand_tars
from clip_jax.data.sources.tar_scan import NUM_FIELDS, scan
from clip_jax.data.sources.tar_versions import current_versions

logger = logging.getLogger(__name__)

# More threads than cores: on network storage a scan waits for the disk, not for the processor. A
# remote scan holds 4 MiB.
_LOCAL_THREADS = 8
_REMOTE_THREADS = 16
_TARS_PER_PROCESS = 8  # fewer are not worth the second that starting a process takes
_LOG_SECONDS = 10.0
# Files of stores that cannot be listed (https) that are looked up where all have an index.
_NUM_CHECKED = 64

Progress = Callable[[int, int], None]  # tars done, tars to do


class SetIndex(NamedTuple):
    """The index of a list of tars: one file of rows, so that it costs a process one descriptor."""

    rows_file: Path  # .npy, uint32 [10 n]: the tars' rows one after another; see `tar_scan.ROW`
    counts: NDArray[np.int64]  # samples of each tar
    num_skipped: int  # samples without image or caption
    damaged: list[tuple[str, str]]  # path, and why and where it cannot be read on, or `NO_END`
    gone: list[str]  # tars that are not there any more
    num_scanned: int  # tars that had no index that fits


class IndexSummary(NamedTuple):
    """What `index_tars` did."""

    num_tars: int
    num_scanned: int  # the others had an index that fits
    num_samples: int
    num_skipped: int  # samples without image or caption
    damaged: list[tuple[str, str]]  # path, and why and where it cannot be read on, or `NO_END`
    seconds: float


def index_tars(
    path: str,
    cache_dir: Path,
    *,
    beside: bool = False,
    retries: int = 3,
    progress: Progress | None = None,
) -> IndexSummary:
    """Index the tars of a path, as `WebdatasetSource` does when it opens them; see `build_indexes`.

    path: see `expand_path`. cache_dir: as given to `open_source`. Local tars are scanned in as many
    processes as there are cores.

    Raises UserError where the path names no files, or one cannot be read.
    """
    started = time.monotonic()
    paths = expand_tars(path)
    index = build_indexes(
        paths,
        cache_dir / "index",
        beside=beside,
        retries=retries,
        progress=progress,
        num_processes=os.cpu_count() or 1,
    )
    return IndexSummary(
        num_tars=len(paths),
        num_scanned=index.num_scanned,
        num_samples=int(index.counts.sum()),
        num_skipped=index.num_skipped,
        damaged=index.damaged,
        seconds=time.monotonic() - started,
    )


def build_indexes(
    paths: Sequence[str],
    index_dir: Path,
    *,
    beside: bool = False,
    retries: int = 3,
    progress: Progress | None = None,
    num_processes: int = 1,
) -> SetIndex:
    """Index a list of tars, scanning only those without an index that fits.

    An index fits if the tar has the size and version (local: modification time; remote: ETag or the
    like) that it was made from. One that lies beside its tar (`X.tar.index.npy`) is taken too; see
    `fits`. Of tars by https that were indexed before, 64 are looked up; of all others, all.

    beside: write the indexes beside the tars as well. progress: called after each tar that is done.
    num_processes: for local tars, if many are to be scanned and this is more than 2; else threads.

    Raises UserError for tars that are not there and were never indexed, and where a store cannot be
    read or written.
    """
    names = "\0".join(map(absolute, paths)).encode(errors="surrogateescape")
    identity = hashlib.sha256(names).hexdigest()
    table_file = index_dir / f"set-{identity[:32]}.npy"
    table = _load_table(table_file, len(paths))
    if table is not None and not beside:
        versions = current_versions(paths, retries, at_most=_NUM_CHECKED)
        rows_file = _rows_file(index_dir, identity, table)
        if rows_file.exists() and all(map(fits, table, versions)):
            return _set_index(paths, versions, table, rows_file, num_scanned=0)
    versions = current_versions(paths, retries)
    files = [index_file(path, index_dir) for path in paths]
    num_scanned = _build(paths, files, versions, retries, progress, num_processes)
    if beside:
        present = [number for number, version in enumerate(versions) if version is not None]
        arguments = [(paths[number], files[number], retries) for number in present]
        _in_parallel(_put_beside, arguments, ThreadPoolExecutor(_REMOTE_THREADS), None)
    table = _join(files, index_dir, identity)
    with replacing(table_file) as stream:
        np.save(stream, table)
    rows_file = _rows_file(index_dir, identity, table)
    return _set_index(paths, versions, table, rows_file, num_scanned)


def _build(
    paths: Sequence[str],
    files: Sequence[Path],
    versions: Sequence[FileInfo | None],
    retries: int,
    progress: Progress | None,
    num_processes: int,
) -> int:
    """Write the index files that are not there or do not fit. Return the number of scans."""
    todo: dict[str, int] = {}  # a tar that is listed twice is scanned once
    missing: list[str] = []
    for number, (path, file, version) in enumerate(zip(paths, files, versions, strict=True)):
        head = load_head(file)
        if head is not None and fits(head, version):
            continue
        if version is None:
            missing.append(path)
        else:
            todo[path] = number
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} tar files do not exist, the first: "
            f"{absolute(missing[0])}; check the path and the brace range"
        )
    if not todo:
        return 0
    logger.info("indexing %d of %d tars into %s", len(todo), len(paths), files[0].parent)
    arguments = [(path, files[number], versions[number], retries) for path, number in todo.items()]
    executor = _executor(list(todo), num_processes)
    return sum(_in_parallel(_index_tar, arguments, executor, progress))


def _executor(paths: Sequence[str], num_processes: int) -> Executor:
    remote = any(map(is_remote, paths))
    num_processes = min(num_processes, len(paths) // _TARS_PER_PROCESS)
    if num_processes > 2 and not remote:
        # A scan is Python: threads share one core.
        return ProcessPoolExecutor(num_processes, get_context("spawn"))
    return ThreadPoolExecutor(_REMOTE_THREADS if remote else _LOCAL_THREADS)


def _in_parallel(
    call: Callable[..., bool],
    arguments: Sequence[tuple[object, ...]],
    executor: Executor,
    progress: Progress | None,
) -> list[bool]:
    """Call with each of the arguments; the first error ends it, once those under way are done."""
    results: list[bool] = []
    logged = time.monotonic()
    with executor:
        futures = [executor.submit(call, *values) for values in arguments]
        try:
            for future in as_completed(futures):
                results.append(future.result())
                if progress is not None:
                    progress(len(results), len(futures))
                if time.monotonic() - logged > _LOG_SECONDS:
                    logged = time.monotonic()
                    logger.info("%d of %d tars done", len(results), len(futures))
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def _index_tar(path: str, file: Path, version: FileInfo, retries: int) -> bool:
    """Write a tar's index file: from the one beside it if that fits, else by a scan (True)."""
    found = load_beside(path, retries)
    if found is not None and fits(found.head, version, beside=True):
        save(file, with_version(found, version))
        return False
    try:
        save(file, of_scan(scan(path, retries), version))
    except BadSampleError as error:
        raise UserError(f"{error}; mend it, or leave the tar out of the path") from None
    return True


def _put_beside(path: str, file: Path, retries: int) -> bool:
    index = load(file)
    if index is not None:
        write_beside(path, index, retries)
    return index is not None


def _load_table(file: Path, num_tars: int) -> NDArray[np.void] | None:
    try:
        with file.open("rb") as stream:
            return read_array(stream, HEAD, (num_tars,), str(file))
    except FileNotFoundError:
        return None


def _rows_file(index_dir: Path, identity: str, table: NDArray[np.void]) -> Path:
    """Named by its content: a run keeps its rows when a tar changes and others index it again.

    Those of before are left where they are: whether another run, on whichever machine, is still to
    open one in its next worker cannot be known. Without runs all that is called rows-* may go.
    """
    content = hashlib.sha256(identity.encode() + table.tobytes()).hexdigest()
    return index_dir / f"rows-{content[:32]}.npy"


def _join(files: Sequence[Path], index_dir: Path, identity: str) -> NDArray[np.void]:
    """Write the rows of tars one after another into one file. Return the tars' heads."""
    heads = [head for file in files if (head := load_head(file)) is not None]
    table = np.array(heads, HEAD)
    rows_file = _rows_file(index_dir, identity, table)
    if not rows_file.exists():
        with replacing(rows_file) as stream:
            num_rows = int(table["num_samples"].sum())
            write_header(stream, np.dtype("<u4"), NUM_FIELDS * num_rows)
            for file, head in zip(files, table, strict=True):
                index = load(file)
                if index is None or index.head != head:
                    raise UserError(f"{file} changed while it was read; start again")
                stream.write(index.rows.tobytes())
    return table


def _set_index(
    paths: Sequence[str],
    versions: Sequence[FileInfo | None],
    table: NDArray[np.void],
    rows_file: Path,
    num_scanned: int,
) -> SetIndex:
    damaged = {
        path: reason.decode(errors="replace")
        for path, reason in zip(paths, table["damage"].tolist(), strict=True)
        if reason
    }
    return SetIndex(
        rows_file,
        table["num_samples"].astype(np.int64),
        int(table["num_skipped"].sum()),
        list(damaged.items()),
        [path for path, version in zip(paths, versions, strict=True) if version is None],
        num_scanned,
    )
