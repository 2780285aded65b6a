"""Whole folders, on a local disk or in a bucket: list, move, delete."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clip_jax.checkpoint.paths import AnyPath, BucketPath
from clip_jax.config import UserError

_AT_ONCE = 16  # objects of a bucket


def below(path: AnyPath, name: str) -> AnyPath:
    """The file `name`, 'state/d/0123', of a folder."""
    for part in name.split("/"):
        path = path / part
    return path


def file_sizes(path: AnyPath) -> dict[str, int]:
    """Bytes of each file below `path`, by its name in it: 'state/d/0123'; {} without a folder."""
    if isinstance(path, BucketPath):
        with _bucket(path) as (filesystem, root):
            found = filesystem.find(root, detail=True)
        return {
            name.removeprefix(f"{root}/"): int(info["size"])
            for name, info in sorted(found.items())
            if name.startswith(f"{root}/") and not name.endswith("/")
        }
    sizes = {}
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder) / name
            sizes[file.relative_to(path).as_posix()] = file.stat().st_size
    return sizes


def names_in(path: AnyPath) -> list[str]:
    """What lies in a folder, sorted; nothing where there is no folder."""
    if isinstance(path, Path) and not path.exists():
        return []
    return sorted(entry.name for entry in path.iterdir())


def move(path: AnyPath, target: AnyPath) -> None:
    """Renames a folder: at once on a local disk; in a bucket its objects are copied, then removed.

    The store copies them itself: they do not travel. gcsfs's own move is an API that is new.
    """
    if not isinstance(path, BucketPath):
        path.rename(str(target))
        return
    names = list(file_sizes(path))
    with (
        _bucket(path) as (filesystem, root),
        _bucket(target) as (_, new),
        ThreadPoolExecutor(_AT_ONCE) as threads,
    ):
        list(threads.map(lambda x: filesystem.cp_file(f"{root}/{x}", f"{new}/{x}"), names))
    remove(path)


def remove(path: AnyPath) -> None:
    """Deletes a folder with all that is in it; nothing happens where it is gone already."""
    if isinstance(path, BucketPath):
        with _bucket(path) as (filesystem, root), contextlib.suppress(FileNotFoundError):
            filesystem.rm(root, recursive=True)
        return
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


@contextlib.contextmanager
def _bucket(path: AnyPath) -> Iterator[tuple[Any, str]]:  # fsspec has no types
    """The filesystem and the name in it; what it raises becomes one line for the user."""
    from fsspec.core import url_to_fs

    try:
        filesystem, root = url_to_fs(str(path), use_listings_cache=False)
        yield filesystem, str(root).rstrip("/")
    except FileNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001 - each store has its own tree of errors
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{path} cannot be reached: {reason}") from None
