"""Byte ranges of files, local or remote, with retries: what sources read through.

Local files are read by `pread` on descriptors that stay open; what has a URL (gs://, s3://,
https://, memory://) by fsspec's ranged requests.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError
from clip_jax.data.sources.store_errors import NoRangesError, may_pass, real_error

# Seconds before the first retry and the factor to the next: 0.1, 0.4, 1.6 cover a dropped
# connection and a short throttling; object stores ask for exponential growth.
_FIRST_WAIT = 0.1
_WAIT_FACTOR = 4
# Seconds for one remote request, and bytes per second on top: no answer after that is a failure.
_TIMEOUT = 10.0
_LEAST_BYTES_PER_SECOND = 2**20
# A read is not tried again after this many seconds, whatever its retries: the clients of the stores
# retry by themselves too.
_TOTAL_SECONDS = 20.0
# So many reads of a store that failed one after another, whichever files they were of, mean that it
# is dead; so many of one file, that the file is. Then a read has one attempt of seconds, until
# one succeeds.
_DEAD_AFTER = 3
_DEAD_TIMEOUT = 2.0
# Tables of web images name hosts by the million: only the stores last used are remembered.
_MOST_FILESYSTEMS = 64
_MOST_FAILING = 4096
# Bytes read at a time in sequence: 64 tars at 50 ms a request make 2.5 GB/s of it, and hold two
# blocks each, 256 MiB in all.
_BLOCK = 2 * 2**20
# What stores call a version of a file, the surest first.
_TAGS = (
    *("generation", "etag", "ETag", "md5Hash", "Content-MD5"),
    *("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created"),
)
# The extra that installs what fsspec needs for a scheme.
_EXTRAS = {
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("http", "https"), "http"),
}

_Result = TypeVar("_Result")
_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class FileInfo(NamedTuple):
    """What tells one version of a file from another."""

    num_bytes: int
    tag: str  # ETag, checksum or modification time; "" where the store gives none


def is_remote(path: str) -> bool:
    """Whether a path is a URL, for fsspec to read."""
    return "://" in path


def remote_filesystem(url: str) -> Any:  # fsspec.AbstractFileSystem: fsspec has no types
    """The fsspec filesystem of a URL. Raises UserError where its package is missing."""
    from fsspec.core import url_to_fs

    try:
        # Its cache of listings would keep every name of a bucket in memory, and be out of date.
        return url_to_fs(url, use_listings_cache=False)[0]
    except (ImportError, ValueError) as error:  # ValueError: no such protocol
        scheme = url.split("://", 1)[0]
        extra = _EXTRAS.get(scheme)
        remedy = f"pip install 'clip-jax-training[{extra}]'" if extra else "is the URL right?"
        raise UserError(f"{url} cannot be read: {one_line(error)}; {remedy}") from None


def info_of(details: dict[str, Any]) -> FileInfo:
    """Size and version out of what fsspec's `info` or `ls` says of a file."""
    tag = next((f"{field}:{details[field]}" for field in _TAGS if details.get(field)), "")
    size = details.get("size")
    if not isinstance(size, int):
        raise OSError("the store does not tell the file's size")
    return FileInfo(size, tag)


def one_line(error: BaseException) -> str:
    """An error's kind and message, for messages of one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class Files:
    """Byte ranges of a list of files, by their number in it.

    Picklable; opens files where they are first read; threads may share it. A read that fails for a
    reason that may pass (no answer, a server's error, an I/O error) is tried again `retries` times,
    0.1, 0.4, 1.6 ... seconds apart; a file that is not there, or is forbidden, is not. After three
    failed reads in a row of a store (a bucket, a host, or all that is local) or of one file it has
    no retries until one of its reads succeeds: a dead store shows in seconds.
    """

    def __init__(self, paths: Sequence[str], retries: int = 3, max_open: int = 256) -> None:
        # A process may have 1,024 files open by default, other libraries' included.
        self._paths = paths
        self._retries = retries
        self._max_open = max_open
        self._prepare()

    def read(self, number: int, start: int, num_bytes: int) -> bytes:
        """Read a byte range of file `number`: shorter only where the file ends.

        Raises BadSampleError("read") if it cannot be had, UserError if a package is missing.
        """
        path = self._paths[number]
        if is_remote(path):
            return self._attempt(path, self._remote(path, start, num_bytes))
        try:
            data = self._open.get(number, lambda: _File(path)).read(start, num_bytes)
        except OSError:  # the ordinary way is kept short: a small sample takes 10 microseconds
            return self._attempt(path, lambda _: self._reopened(number, start, num_bytes))
        if self._failed:
            self._succeeded(path)
        return data

    def path(self, number: int) -> str:
        return self._paths[number]

    def info(self, number: int) -> FileInfo:
        """Size and version of file `number`. Raises as `read` does."""
        path = self._paths[number]
        if not is_remote(path):
            return self._attempt(path, lambda _: local_info(path))
        filesystem = self._filesystem(path)

        def call(timeout: float) -> FileInfo:
            details = _call(filesystem, "info", timeout, filesystem._strip_protocol(path))
            return info_of(details)

        return self._attempt(path, call)

    def size(self, number: int) -> int:
        """Bytes of file `number`. Raises as `read` does."""
        return self.info(number).num_bytes

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_open"], state["_filesystems"], state["_failed"], state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def _prepare(self) -> None:
        self._open = _LastUsed[int, _File](self._max_open)
        self._filesystems = _LastUsed[str, Any](_MOST_FILESYSTEMS)
        self._failed: OrderedDict[str, int] = OrderedDict()  # reads in a row: stores, files
        self._lock = threading.Lock()

    def _filesystem(self, url: str) -> Any:
        return self._filesystems.get(_store(url), lambda: remote_filesystem(url))

    def _remote(self, url: str, start: int, num_bytes: int) -> Callable[[float], bytes]:
        filesystem = self._filesystem(url)

        def call(timeout: float) -> bytes:
            if num_bytes <= 0:
                return b""
            timeout += num_bytes / _LEAST_BYTES_PER_SECOND
            name = filesystem._strip_protocol(url)
            data: bytes = _call(
                filesystem, "cat_file", timeout, name, start=start, end=start + num_bytes
            )
            if len(data) > num_bytes:
                raise NoRangesError
            return data

        return call

    def _reopened(self, number: int, start: int, num_bytes: int) -> bytes:
        self._open.forget(number)  # a stale handle of a network disk stays stale
        path = self._paths[number]
        return self._open.get(number, lambda: _File(path)).read(start, num_bytes)

    def _attempt(self, path: str, call: Callable[[float], _Result]) -> _Result:
        started = time.monotonic()
        store = _store(path)
        attempts = 0
        while True:
            dead_store = self._failed.get(store, 0) >= _DEAD_AFTER
            dead = dead_store or self._failed.get(path, 0) >= _DEAD_AFTER
            attempts += 1
            try:
                result = call(_DEAD_TIMEOUT if dead else _TIMEOUT)
            except Exception as error:  # noqa: BLE001 - each store has its own tree of errors
                # In no variable, which would be a cycle with this frame and keep files open.
                passing = may_pass(real_error(error, path))
                late = time.monotonic() - started > _TOTAL_SECONDS
                if not passing or dead or late or attempts > self._retries:
                    if passing:
                        # In a store that is dead, nothing shows of a file.
                        self._count_failed(*[store] if dead_store else [store, path])
                    times = f" ({attempts} attempts)" if attempts > 1 else ""
                    reason = one_line(real_error(error, path))
                    message = f"{path}: {reason}{times}"
                    raise BadSampleError("read", message) from real_error(error, path)
                time.sleep(_FIRST_WAIT * _WAIT_FACTOR ** (attempts - 1))
            else:
                if self._failed:
                    self._succeeded(path)
                return result

    def _count_failed(self, *names: str) -> None:
        with self._lock:
            for name in names:
                self._failed[name] = self._failed.pop(name, 0) + 1
            while len(self._failed) > _MOST_FAILING:
                self._failed.popitem(last=False)

    def _succeeded(self, path: str) -> None:
        with self._lock:
            self._failed.pop(_store(path), None)
            self._failed.pop(path, None)


def unreadable(path: str, error: BadSampleError) -> UserError:
    """What a run ends with where a file cannot be looked up, though it may be there."""
    reason = str(error).removeprefix(f"{path}: ")
    return UserError(f"{path} cannot be read: {reason}; check the path and the access to it")


def no_ranges(path: str) -> UserError:
    """What a run ends with where a server sends whole files alone."""
    return UserError(
        f"{path}: the server ignores byte ranges, which both random access and streams need; use "
        "one that knows them (nginx, Apache, a bucket), or copy the files to a disk"
    )


def _store(path: str) -> str:
    """The bucket or host of a URL; "" of a local file."""
    scheme, separator, rest = path.partition("://")
    return scheme + separator + rest.split("/", 1)[0] if separator else ""


def local_info(path: str) -> FileInfo:
    """Size and version of a local file. Raises OSError."""
    stat = os.stat(path)
    return FileInfo(stat.st_size, f"mtime_ns:{stat.st_mtime_ns}")


def _call(filesystem: Any, method: str, timeout: float, *args: Any, **kwargs: Any) -> Any:
    """Call a method of an fsspec filesystem, with a time limit where it can have one."""
    if getattr(filesystem, "async_impl", False):
        from fsspec.asyn import sync

        coroutine = getattr(filesystem, f"_{method}")
        return sync(filesystem.loop, coroutine, *args, timeout=timeout, **kwargs)
    return getattr(filesystem, method)(*args, **kwargs)


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

    def read(self, start: int, num_bytes: int) -> bytes:
        data = os.pread(self._descriptor, num_bytes, start)
        while len(data) < num_bytes:  # the end of the file, or a network disk's short answer
            more = os.pread(self._descriptor, num_bytes - len(data), start + len(data))
            if not more:
                break
            data += more
        return data


class _LastUsed(Generic[_Key, _Value]):
    """The values last used, up to `size`; safe to share between threads."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[_Key, _Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: _Key, make: Callable[[], _Value]) -> _Value:
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
                return value
        value = make()  # not locked: opening a file may wait for a network disk
        with self._lock:
            value = self._values.setdefault(key, value)
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        return value

    def forget(self, key: _Key) -> None:
        with self._lock:
            self._values.pop(key, None)


def open_sequential(path: str, offset: int = 0, retries: int = 3) -> "SequentialFile":
    """Open a file to be read once from `offset` to its end, in large ranges.

    Raises BadSampleError("read") where it cannot be had, UserError if a package is missing.
    """
    return SequentialFile(path, offset, retries)


class SequentialFile:
    """What `open_sequential` gives: `read`, `tell`, `size`; one thread may use it.

    A failed range is asked for again from where it began: no byte is lost or read twice. Of a
    remote file, the next range is fetched while this one is used.
    """

    def __init__(self, path: str, offset: int, retries: int) -> None:
        self._path = path
        self._files = Files([path], retries, max_open=1)
        self.size = self._files.size(0)  # bytes
        self._position = offset
        self._block = b""
        self._block_start = offset
        self._thread = ThreadPoolExecutor(1, "read-ahead") if is_remote(path) else None
        self._next: Future[bytes] | None = None

    def tell(self) -> int:
        """Bytes from the start of the file to what `read` returns next."""
        return self._position

    def read(self, num_bytes: int) -> bytes:
        """The next bytes: fewer only at the end of the file. Raises BadSampleError("read")."""
        parts: list[bytes] = []
        wanted = min(num_bytes, self.size - self._position)
        while wanted > 0:
            begin = self._position - self._block_start
            part = self._block[begin : begin + wanted]
            if not part:
                if not self._fetch():
                    break
                continue
            parts.append(part)
            self._position += len(part)
            wanted -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._block, self._next = b"", None
        self._block_start = self._position

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _fetch(self) -> bool:
        """Take the block at the position and start on the next. False: the file got shorter."""
        start = self._position
        pending, self._next = self._next, None
        try:
            self._block = pending.result() if pending else self._files.read(0, start, _BLOCK)
        except BadSampleError as error:
            if isinstance(error.__cause__, NoRangesError):
                raise no_ranges(self._path) from None
            raise
        self._block_start = start
        if self._thread is not None and start and len(self._block) == self.size:
            raise no_ranges(self._path)
        after = start + len(self._block)
        if self._thread is not None and self._block and after < self.size:
            self._next = self._thread.submit(self._files.read, 0, after, _BLOCK)
        return bool(self._block)
