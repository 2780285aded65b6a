"""A bucket in memory that fails when told to, and counts what it is asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from clip_jax.checkpoint.locks import BucketLock
from clip_jax.checkpoint.paths import BucketPath


class Bucket(MemoryFileSystem):
    """`teststore://NAME/...`, as fsspec's own memory:// but for the failures and the counts."""

    protocol = "teststore"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    down: ClassVar[Exception | None] = None  # the error of every request
    written: ClassVar[list[tuple[str, int]]] = []  # names and bytes of the objects

    @classmethod
    def empty(cls) -> None:
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.written.clear()
        cls.down = None

    @classmethod
    def objects(cls) -> dict[str, str]:
        """What lies in the bucket, by name without the folder."""
        return {
            name.rsplit("/", 1)[1]: file.getvalue().decode() for name, file in cls.store.items()
        }

    @classmethod
    def age(cls, seconds: float) -> None:
        """Makes what lies there older."""
        for file in cls.store.values():
            file.modified -= timedelta(seconds=seconds)

    @classmethod
    @contextmanager
    def failing(cls, error: Exception) -> Iterator[None]:
        cls.down = error
        try:
            yield
        finally:
            cls.down = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("teststore://", "memory://"))

    def _check(self) -> None:
        if self.down is not None:
            raise self.down

    def info(self, path: str, **kwargs: Any) -> Any:
        self._check()
        return super().info(path, **kwargs)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self._check()
        return super().ls(path, detail=detail, **kwargs)

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._check()
        return super().cat_file(path, *args, **kwargs)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._check()
        super().pipe_file(path, value, mode=mode, **kwargs)
        self.written.append((path.rsplit("/", 1)[1], len(value)))

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        self._check()
        super().put_file(lpath, rpath, **kwargs)

    def rm_file(self, path: str) -> None:
        self._check()
        super().rm_file(path)


fsspec.register_implementation("teststore", Bucket, clobber=True)


def lock_as_elsewhere(folder: BucketPath, monkeypatch: Any) -> BucketLock:
    """A lock whose owner says that it runs on another machine."""
    with monkeypatch.context() as patch:
        patch.setattr("clip_jax.checkpoint.locks._machine", lambda: "another machine")
        return BucketLock(folder)
