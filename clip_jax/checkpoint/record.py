"""checksums.json: what a checkpoint consists of. Written last: without it none is complete."""

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from clip_jax.checkpoint import checksums
from clip_jax.checkpoint.checksums import SavedArray
from clip_jax.checkpoint.folders import below, file_sizes
from clip_jax.checkpoint.paths import AnyPath, write_atomically
from clip_jax.config import UserError

NAME = "checksums.json"
_FORMAT = 1
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's
_OF_PROCESSES = "checksums"  # folder of what each process wrote

# Files of arrays that are larger are covered by the checksums of their arrays alone: they would
# have to be read again, and in a bucket fetched, to be checksummed when they are saved.
_LARGE_BYTES = 2**20
_AT_ONCE = 32  # files: a bucket answers after 50 ms, however small they are

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class DamagedError(UserError):
    """A checkpoint is not what was saved; the message says in what."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What a checkpoint consisted of when it was saved."""

    step: int
    saved_at: float  # seconds since 1970
    num_processes: int  # that saved it
    groups: tuple[str, ...]  # of the state
    files: dict[str, tuple[int, int | None]]  # by name: bytes, and CRC-32 of all but large ones
    arrays: dict[str, SavedArray]

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


def write_record(
    path: AnyPath, *, step: int, saved_at: float, num_processes: int, groups: Iterable[str]
) -> None:
    """Completes what Orbax has saved in `path`: all its files are there and will not change."""
    sizes = file_sizes(path)
    small = [name for name, size in sizes.items() if not _is_large(name, size)]
    read = _in_threads(lambda name: below(path, name).read_bytes(), small)
    texts = dict(zip(small, read, strict=True))
    of_processes = [
        checksums.from_json(json.loads(texts[f"{_OF_PROCESSES}/process_{process}.json"]))
        for process in range(num_processes)
    ]
    arrays = checksums.merged(of_processes)
    assert all(array.is_covered() for array in arrays.values()), "an array without its checksums"
    content = {
        "format": _FORMAT,
        "step": step,
        "saved_at": saved_at,
        "num_processes": num_processes,
        "groups": list(groups),
        "files": {
            name: [size, zlib.crc32(texts[name]) if name in texts else None]
            for name, size in sizes.items()
        },
        "arrays": checksums.to_json(arrays),
    }
    text = json.dumps({"checksum": _checksum(content), "content": content}, separators=(",", ":"))
    write_atomically(path / NAME, text)


def read_record(path: AnyPath) -> Record:
    """Raises DamagedError where the record is not there or not as it was written."""
    try:
        parsed = json.loads((path / NAME).read_text(encoding="utf-8"))
        content = parsed["content"]
        if parsed["checksum"] != _checksum(content):
            raise DamagedError(f"{NAME} has changed since it was saved")
    except FileNotFoundError:
        raise DamagedError(f"{NAME} is missing") from None
    except UserError:  # among them: a bucket does not answer, which is no damage
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{NAME} cannot be read: {one_line(error)}") from None
    if content["format"] != _FORMAT:
        raise UserError(
            f"{path} has format {content['format']} of a newer clip-jax, not {_FORMAT}; update it"
        )
    return Record(
        step=content["step"],
        saved_at=content["saved_at"],
        num_processes=content["num_processes"],
        groups=tuple(content["groups"]),
        files={name: (size, crc) for name, (size, crc) in content["files"].items()},
        arrays=checksums.from_json(content["arrays"]),
    )


def read_metadata(path: AnyPath, record: Record) -> dict[str, Any]:
    """What was saved beside the state. Raises DamagedError where it has changed."""
    try:
        data = (path / _METADATA).read_bytes()
        if (len(data), zlib.crc32(data)) != record.files.get(_METADATA):
            raise DamagedError(f"{_METADATA} has changed since it was saved")
        metadata: dict[str, Any] = json.loads(data)["custom_metadata"]
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise DamagedError(f"{_METADATA} cannot be read: {one_line(error)}") from None
    return metadata


def file_problems(path: AnyPath, record: Record) -> list[str]:
    """Files that are missing, cut short or, as far as they are small, changed; no arrays."""
    sizes = file_sizes(path)

    def problem(item: tuple[str, tuple[int, int | None]]) -> str | None:
        name, (size, crc) = item
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]:,} bytes, {size:,} when it was saved"
        try:
            if crc is None or zlib.crc32(below(path, name).read_bytes()) == crc:
                return None
        except OSError as error:
            return f"{name} cannot be read: {one_line(error)}"
        return f"{name} has changed since it was saved"

    return [found for found in _in_threads(problem, list(record.files.items())) if found]


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _is_large(name: str, size: int) -> bool:
    return size > _LARGE_BYTES and "/d/" in name


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _in_threads(work: Callable[[_Item], _Result], items: list[_Item]) -> Iterator[_Result]:
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        yield from threads.map(work, items)
