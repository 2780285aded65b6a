"""Parquet and Arrow files in parts: row groups and record batches.

pyarrow reads a row group of parquet, or a compressed record batch, as a whole: a single row costs
as much. Uncompressed Arrow files are mapped into memory and cost what is used of them.
"""

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from clip_jax.config.errors import UserError
from clip_jax.data.sources.files import Files, is_remote

if TYPE_CHECKING:
    import pyarrow as pa

_PARQUET_MAGIC, _ARROW_MAGIC, _MAGIC_BYTES = b"PAR1", b"ARROW1", 8


def import_pyarrow() -> None:
    """Raises UserError where the package is missing."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError(
            "parquet and arrow files need the package pyarrow: pip install pyarrow"
        ) from None


class PartsFile(Protocol):
    """A file that is read part by part; threads may share it."""

    schema: "pa.Schema"

    def sizes(self) -> list[tuple[int, int]]:
        """The rows of each part, and the bytes that reading one of them takes, about."""
        ...

    def read(self, part: int) -> "pa.Table":
        """The wanted columns of a part. Raises OSError and pa.ArrowException (a ValueError)."""
        ...


def open_parts(
    files: Files, number: int, path: str, columns: Sequence[str] | None = None
) -> PartsFile:
    """Open file `number`, of which `columns` are wanted (None: all).

    Raises BadSampleError("read") where it cannot be had, OSError or ValueError where it is damaged.
    """
    magic = files.read(number, 0, _MAGIC_BYTES)
    if magic.startswith(_PARQUET_MAGIC):
        return _Parquet(files, number, path, columns)
    if magic.startswith(_ARROW_MAGIC):
        return _ArrowFile(files, number, path, columns)
    if is_remote(path):
        raise ValueError("neither parquet nor an Arrow file; Arrow streams must be local")
    return _ArrowStream(path)


class _Parquet:
    def __init__(self, files: Files, number: int, path: str, columns: Sequence[str] | None) -> None:
        import pyarrow.parquet as pq

        self._source = (files, number, path)
        self._columns = None if columns is None else list(columns)
        self._metadata = pq.ParquetFile(_RangeFile(files, number)).metadata
        self.schema = self._metadata.schema.to_arrow_schema()

    def sizes(self) -> list[tuple[int, int]]:
        groups = map(self._metadata.row_group, range(self._metadata.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]

    def read(self, part: int) -> "pa.Table":
        """Each read has a file of its own, so that threads do not wait for one another."""
        files, number, path = self._source
        if not is_remote(path):
            try:  # pyarrow's own reading: without the interpreter's lock, five times as fast
                return self._read(part, path)
            except OSError:
                files.size(number)  # raises where it is gone
        return self._read(part, _RangeFile(files, number), pre_buffer=True)

    def _read(self, part: int, source: Any, **options: Any) -> "pa.Table":
        import pyarrow.parquet as pq

        with pq.ParquetFile(source, metadata=self._metadata, **options) as file:
            return file.read_row_group(part, columns=self._columns, use_threads=False)


class _Batches:
    """Record batches, looked through when they are first read.

    pyarrow believes what they say of where their values lie: of a damaged file, it would read
    whatever memory that points to.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def _checked(self, batch: "pa.RecordBatch", part: int) -> "pa.Table":
        import pyarrow as pa

        if part not in self._seen:
            batch.validate(full=True)
            self._seen.add(part)
        return pa.Table.from_batches([batch])


class _ArrowFile(_Batches):
    def __init__(self, files: Files, number: int, path: str, columns: Sequence[str] | None) -> None:
        import pyarrow as pa

        super().__init__()
        source = (
            pa.PythonFile(_RangeFile(files, number)) if is_remote(path) else pa.memory_map(path)
        )
        self._reader = pa.ipc.open_file(source)
        self.schema = self._reader.schema
        # A choice of columns spares unpacking the others; but of a mapped file it makes copies.
        if columns is not None and not _is_mapped(source, self._reader):
            self._reader = pa.ipc.open_file(source, options=_options(self.schema, columns))
        self._lock = threading.Lock()
        self._source, self._num_bytes = source, files.size(number)

    def sizes(self) -> list[tuple[int, int]]:
        import pyarrow as pa

        # A batch says how long it is when it is read: of one column, and not the images'.
        small = [field.name for field in self.schema if pa.types.is_primitive(field.type)]
        small += [field.name for field in self.schema if pa.types.is_string(field.type)]
        columns = (small or self.schema.names)[:1]
        reader = pa.ipc.open_file(self._source, options=_options(self.schema, columns))
        parts = range(reader.num_record_batches)
        return [(reader.get_batch(part).num_rows, self._num_bytes // len(parts)) for part in parts]

    def read(self, part: int) -> "pa.Table":
        with self._lock:
            batch = self._reader.get_batch(part)
        return self._checked(batch, part)


class _ArrowStream(_Batches):
    """A local file in Arrow's streaming format, as Hugging Face's datasets caches them."""

    def __init__(self, path: str) -> None:
        import pyarrow as pa

        super().__init__()
        source = pa.memory_map(path)
        reader = pa.ipc.open_stream(source)
        self.schema = reader.schema
        self._batches: list[pa.RecordBatch] = []
        # Mapped: this reads where the batches lie, not what is in them.
        for batch in reader:
            if not _is_within(source, batch):
                raise ValueError("a compressed Arrow stream: write it as an Arrow file or parquet")
            self._batches.append(batch)

    def sizes(self) -> list[tuple[int, int]]:
        return [(batch.num_rows, batch.nbytes) for batch in self._batches]

    def read(self, part: int) -> "pa.Table":
        return self._checked(self._batches[part], part)


def _is_mapped(source: Any, reader: Any) -> bool:
    """Whether a file's batches are used where they lie: it is local and not compressed."""
    import pyarrow as pa

    if not isinstance(source, pa.MemoryMappedFile) or not reader.num_record_batches:
        return False
    return _is_within(source, reader.get_batch(0))


def _is_within(source: Any, batch: "pa.RecordBatch") -> bool:
    """Whether a batch's values, but for a few that were aligned anew, lie in a mapped file."""
    position = source.tell()
    source.seek(0)
    whole = source.read_buffer()
    source.seek(position)
    total = copied = 0
    for column in batch.columns:
        for buffer in filter(None, column.buffers()):
            total += buffer.size
            if not whole.address <= buffer.address <= whole.address + whole.size:
                copied += buffer.size
    return 2 * copied <= total


def _options(schema: "pa.Schema", columns: Sequence[str]) -> Any:
    import pyarrow as pa

    numbers = [schema.get_field_index(name) for name in columns]
    return pa.ipc.IpcReadOptions(use_threads=False, included_fields=sorted(numbers))


class _RangeFile(io.RawIOBase):
    """A file as pyarrow wants it, read through `Files`: remotely too, with its retries."""

    def __init__(self, files: Files, number: int) -> None:
        self._files = files
        self._number = number
        self._position = 0
        self._size = files.size(number)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, num_bytes: int | None = -1) -> bytes:
        left = max(0, self._size - self._position)
        wanted = left if num_bytes is None or num_bytes < 0 else min(num_bytes, left)
        data = self._files.read(self._number, self._position, wanted)
        self._position += len(data)
        return data


class PartCache:
    """The parts last read, up to `max_bytes` of them and at least one; threads may share it.

    Threads that ask for the same part at the same time wait for one of them to read it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[int, bool], _Entry] = OrderedDict()
        self._num_bytes = 0

    def get(self, key: tuple[int, bool], read: Callable[[], "pa.Table"]) -> "pa.Table":
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
        with entry.lock:
            if entry.table is None:
                try:
                    entry.table = read()
                except BaseException:
                    with self._lock:
                        self._entries.pop(key, None)
                    raise
                self._count(key, entry)
            return entry.table

    def _count(self, key: tuple[int, bool], entry: "_Entry") -> None:
        """Count a part that was read, and let go of the oldest ones that are too many."""
        assert entry.table is not None
        with self._lock:
            if self._entries.get(key) is not entry:  # let go of while it was read
                return
            entry.num_bytes = entry.table.nbytes
            self._num_bytes += entry.num_bytes
            self._entries.move_to_end(key)
            while self._num_bytes > self._max_bytes and len(self._entries) > 1:
                self._num_bytes -= self._entries.popitem(last=False)[1].num_bytes


class _Entry:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.table: pa.Table | None = None
        self.num_bytes = 0
