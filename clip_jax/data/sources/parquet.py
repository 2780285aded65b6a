"""Parquet and Arrow files with columns of images and captions."""

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError, Record
from clip_jax.data.sources.arrow_files import (
    PartCache,
    PartsFile,
    import_pyarrow,
    open_parts,
)
from clip_jax.data.sources.caption_values import (
    Captions,
    captions_of_values,
    check_captions,
    class_captions,
    find_column,
    nested_value,
)
from clip_jax.data.sources.files import Files, one_line
from clip_jax.data.sources.path_files import PathFiles, folder_of, resolve
from clip_jax.data.sources.stored_arrays import StoredArray, replacing
from clip_jax.data.sources.tar_paths import expand_path

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = (
    *("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes"),
    *("image_path", "filepath", "file_name", "path"),
)
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "title", "sentences")
_LABELS = ("label", "labels")
_VERSION = 1  # of the index: part of its hash
# A part of a file, in order: the file, the part's number in it and its first row there.
_PART = [("file", "<i4"), ("part", "<i4"), ("first", "<i8"), ("num_bytes", "<i8")]
_CACHE_BYTES = 128 * 2**20  # of a process: for reading in order, a shuffle finds nothing in it
_MAX_OPEN = 32  # files, whose metadata takes about 1 kB for each column of a row group
_LARGE_PART = 64 * 2**20  # bytes
# Files whose columns are compared with the first's, evenly spread.
_NUM_CHECKED = 256
_THREADS = 16  # more than cores: they wait for the storage


class ParquetSource:
    """The rows of some parquet or Arrow (feather, IPC) files.

    path: files, see `expand_path`. index_dir: where the list of their row groups is kept.

    image_key: the column of images: bytes, a struct of `bytes` and `path` as Hugging Face's
    datasets writes it, or paths relative to the file's folder; "": the first of `image`, `jpg`, ...
    caption_keys: columns of texts or lists of texts, `a.b` for a field of a struct; (): the first
    of `caption`, `captions`, `text`, ... that is there. Without any, a `label` whose classes
    Hugging Face's datasets has named makes the captions: `templates` filled with the class,
    underscores as blanks. caption_weights: see `captions_of_values`.

    A row costs reading its whole row group, so random order wants small ones: of images of 20 kB,
    groups of 100 rows, as Hugging Face's datasets writes them, give 800 reads a second and core
    from the disk cache, groups of 1,000 rows 110. A warning tells of row groups over 64 MiB.
    Memory: 128 MiB of parts read last and the metadata of 32 files; uncompressed Arrow files are
    mapped and count as disk cache.

    on_bad_sample: 'skip' leaves out files that are damaged as a whole, 'fail' raises for them.

    Pickles to its paths; threads may share it. Raises UserError for files that are missing or none
    of this kind, columns that are not there (the first file's, and those of 256 others), and where
    the first rows have no caption.
    """

    def __init__(
        self,
        path: str,
        index_dir: Path,
        *,
        image_key: str = "",
        caption_keys: Sequence[str] = (),
        caption_weights: Sequence[float] = (),
        templates: Sequence[str] = ("{}",),
        retries: int = 3,
        on_bad_sample: Literal["skip", "fail"] = "skip",
    ) -> None:
        import_pyarrow()
        self._paths = expand_path(path)
        self._files = Files(self._paths, retries)
        self._images = PathFiles(retries)
        self._weights = tuple(caption_weights)
        self._templates = tuple(templates)
        try:
            self._ends, self._parts = _index(
                self._files, self._paths, index_dir, skip=on_bad_sample == "skip"
            )
        except BadSampleError as error:
            raise UserError(f"{path}: {error}") from None
        parts = self._parts()
        if not len(self):
            raise UserError(f"{path}: no row in {len(self._paths)} files")
        largest = int(parts["num_bytes"].max())
        if largest > _LARGE_PART:
            logger.warning(
                "%s: row groups of up to %d MB, read whole for each of their rows; write the files "
                "again with fewer rows to a group (pyarrow: row_group_size=100), or as tars",
                path,
                largest // 10**6,
            )
        first = int(parts["file"][0])
        schema = open_parts(self._files, first, self._paths[first]).schema
        names = list(schema.names)
        self._image = find_column(image_key, IMAGE_COLUMNS, names, path=path, setting="image_key")
        _check_image(schema, self._image, path)
        self._classes: list[str] | None = None  # names, where a label makes the captions
        keys = [name for name in _LABELS if name in names][:1]
        if keys and not caption_keys and not any(name in names for name in CAPTION_COLUMNS):
            self._classes = _class_names(schema, keys[0])
        if self._classes is None:
            keys = [
                find_column(key, CAPTION_COLUMNS, names, path=path, setting="caption_keys")
                for key in caption_keys or ("",)
            ]
        self._caption_keys = tuple(keys)
        # Columns to read: a field of a struct comes with it.
        self._text_columns = [_column(names, key) for key in keys]
        self._prepare()
        self._check_columns(first, schema, path)
        check_captions(self, path)

    def __len__(self) -> int:
        ends = self._ends()
        return int(ends[-1]) if len(ends) else 0

    def __getitem__(self, index: int) -> Record:
        """Read a row. Raises IndexError and BadSampleError."""
        place = self._place(index)
        row = self._row(place, with_image=True)
        captions = self._captions(row)
        image = self._image_of(nested_value(row, self._image), place)
        return Record(image, captions[0], str(place.row_of_file), captions[1])

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a row. Raises as reading it does."""
        return self._captions(self._row(self._place(index), with_image=False))[0]

    def shard(self, index: int) -> str:
        """The file that holds a row."""
        return self._paths[self._place(index).file]

    def locate(self, index: int) -> str:
        """A row's file and its number in it."""
        place = self._place(index)
        return f"{self._paths[place.file]}, row {place.row_of_file}"

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_cache", "_open", "_lock"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def _prepare(self) -> None:
        self._cache = PartCache(_CACHE_BYTES)
        self._open: OrderedDict[tuple[int, bool], PartsFile] = OrderedDict()
        self._lock = threading.Lock()

    def _place(self, index: int) -> "_Place":
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        ends = self._ends()
        number = int(np.searchsorted(ends, index, side="right"))
        file, part, first, _ = self._parts()[number].item()
        row = index - (int(ends[number - 1]) if number else 0)
        return _Place(number, file, part, row, first + row)

    def _check_columns(self, first: int, schema: "pa.Schema", path: str) -> None:
        """Raises UserError where a file lacks a column that the first one has."""
        wanted = {_column(schema.names, key) for key in (self._image, *self._caption_keys)}
        others = [number for number in np.unique(self._parts()["file"]).tolist() if number != first]
        last = len(others) - 1
        spread = {round(step * last / (_NUM_CHECKED - 1)) for step in range(_NUM_CHECKED)}
        checked = [others[place] for place in sorted(spread) if others]

        def names_of(number: int) -> list[str]:
            try:
                return list(open_parts(self._files, number, self._paths[number]).schema.names)
            except (OSError, ValueError):  # its rows will be bad samples
                return list(wanted)

        with ThreadPoolExecutor(_THREADS) as pool:
            for number, names in zip(checked, pool.map(names_of, checked), strict=True):
                if not wanted <= set(names):
                    raise UserError(
                        f"{path}: files of other columns: {self._paths[first]} has "
                        f"{', '.join(schema.names)}; {self._paths[number]} has {', '.join(names)}; "
                        "make a source of each, with its own image_key and caption_keys"
                    )

    def _row(self, place: "_Place", *, with_image: bool) -> dict[str, object]:
        columns = list(dict.fromkeys([self._image] * with_image + self._text_columns))

        def read() -> "pa.Table":
            return self._file(place.file, columns, with_image=with_image).read(place.part)

        path = self._paths[place.file]
        try:
            table = self._cache.get((place.number, with_image), read)
            return {name: table.column(name)[place.row].as_py() for name in columns}
        except BadSampleError:
            raise
        except FileNotFoundError as error:
            raise BadSampleError("read", f"{path}: {one_line(error)}") from None
        # pyarrow's errors are of all these kinds; what the storage did has been raised above.
        except (OSError, ValueError, LookupError, NotImplementedError) as error:
            raise BadSampleError("archive", f"{path}: {one_line(error)}") from None

    def _file(self, number: int, columns: Sequence[str], *, with_image: bool) -> PartsFile:
        key = (number, with_image)
        with self._lock:
            file = self._open.get(key)
            if file is not None:
                self._open.move_to_end(key)
                return file
        file = open_parts(self._files, number, self._paths[number], columns)
        with self._lock:
            file = self._open.setdefault(key, file)
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        return file

    def _captions(self, row: dict[str, object]) -> Captions:
        values = [nested_value(row, key) for key in self._caption_keys]
        if self._classes is None:
            return captions_of_values(values, self._caption_keys, self._weights)
        label = values[0]
        if not isinstance(label, int) or not 0 <= label < len(self._classes):  # -1: not known
            raise BadSampleError(
                "caption", f"label {label!r} is none of {len(self._classes)} classes"
            )
        return class_captions(self._classes[label], self._templates), ()

    def _image_of(self, value: object, place: "_Place") -> bytes:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if isinstance(value, str) and value.strip():
            folder = folder_of(self._paths[place.file])
            return self._images.read(resolve(folder, value.strip()))
        raise BadSampleError("image", f"no image in column '{self._image}'")


class _Place(NamedTuple):
    """Where a row is."""

    number: int  # of the part among all
    file: int
    part: int  # of the file
    row: int  # of the part
    row_of_file: int


def _index(
    files: Files, paths: Sequence[str], index_dir: Path, *, skip: bool
) -> tuple[StoredArray, StoredArray]:
    """Where each part of the files ends, int64 [n], and the parts; made once for their versions.

    Files that are damaged are left out where `skip` says so, else they raise UserError.
    """
    numbers = range(len(paths))
    with ThreadPoolExecutor(min(_THREADS, len(paths))) as pool:
        infos = list(pool.map(files.info, numbers))
        identity = hashlib.sha256(f"{_VERSION}".encode())
        for path, info in zip(paths, infos, strict=True):
            identity.update(f"\0{path}\0{info}".encode(errors="surrogateescape"))
        parts_file = index_dir / f"parts-{identity.hexdigest()[:32]}"
        ends_file = parts_file.with_name(f"{parts_file.name}-ends")
        if not ends_file.exists():
            found = pool.map(lambda number: _parts_of(files, number, paths[number]), numbers)
            rows: list[tuple[int, int, int, int]] = []
            ends: list[int] = []
            damaged = 0
            for number, layout in enumerate(found):
                if isinstance(layout, str):
                    if not skip:
                        raise UserError(
                            f"{paths[number]}: {layout}; write it again, leave it out of the path, "
                            "or set data.on_bad_sample to 'skip'"
                        )
                    logger.warning("%s: left out: %s", paths[number], layout)
                    damaged += 1
                    continue
                first = 0
                for part, (num_rows, num_bytes) in enumerate(layout):
                    rows.append((number, part, first, num_bytes))
                    first += num_rows
                    ends.append((ends[-1] if ends else 0) + num_rows)
            if damaged == len(paths):
                raise UserError(f"{paths[0]}: none of {damaged} files can be read: {layout}")
            with replacing(parts_file) as stream:
                stream.write(np.array(rows, _PART).tobytes())
            # Written last: where it is there, the parts are too.
            with replacing(ends_file) as stream:
                stream.write(np.array(ends, "<i8").tobytes())
    return StoredArray(ends_file, "<i8"), StoredArray(parts_file, _PART)


def _parts_of(files: Files, number: int, path: str) -> list[tuple[int, int]] | str:
    """Rows and bytes of each part of a file, or why it cannot be read."""
    try:
        return open_parts(files, number, path).sizes()
    except BadSampleError:
        raise
    except (OSError, ValueError) as error:  # of pyarrow: a damaged file
        return one_line(error)


def _check_image(schema: "pa.Schema", name: str, path: str) -> None:
    import pyarrow as pa

    if name not in schema.names:  # a field of a struct
        return
    kind = schema.field(name).type
    if pa.types.is_struct(kind):
        fields = [kind.field(number).name for number in range(kind.num_fields)]
        fits = "bytes" in fields or "path" in fields
    else:
        fits = any(
            test(kind)
            for test in (
                *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
                *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
            )
        )
    if not fits:
        raise UserError(
            f"{path}: column '{name}' is of type {kind}; images are bytes, paths, or a struct of "
            "bytes and path; name another with image_key"
        )


def _column(names: Sequence[str], key: str) -> str:
    """The column that a key is of: itself, or the struct that it is a field of."""
    return key if key in names else key.partition(".")[0]


def _class_names(schema: "pa.Schema", column: str) -> list[str] | None:
    """The classes that Hugging Face's datasets has written for a column, if any."""
    try:
        content = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = content["info"]["features"][column]["names"]
    except (ValueError, LookupError, TypeError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None
