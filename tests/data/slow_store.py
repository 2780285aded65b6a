"""A store that answers late and fails where it is told to: the fsspec filesystem `slow://`."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem


class SlowStore(AbstractFileSystem):
    """Files by name, in memory. Every request takes `seconds` and is counted."""

    protocol = "slow"
    files: ClassVar[dict[str, bytes]] = {}
    seconds: ClassVar[float] = 0.0
    fails: ClassVar[Callable[[str, int], Exception | None]]  # name and first byte to an error
    in_flight: ClassVar[int] = 0
    most_in_flight: ClassVar[int] = 0
    num_requests: ClassVar[int] = 0
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        with self._request(path, -1):
            return {"name": path, "size": len(self._content(path)), "type": "file"}

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        with self._request(path, start or 0):
            return self._content(path)[start:end]

    def _content(self, path: str) -> bytes:
        name = self._strip_protocol(path)
        if name not in self.files:
            raise FileNotFoundError(path)
        return self.files[name]

    @contextmanager
    def _request(self, path: str, start: int) -> Iterator[None]:
        cls = SlowStore
        with cls._lock:
            cls.num_requests += 1
            cls.in_flight += 1
            cls.most_in_flight = max(cls.most_in_flight, cls.in_flight)
        try:
            time.sleep(cls.seconds)
            error = cls.fails(self._strip_protocol(path), start)
            if error is not None:
                raise error
            yield
        finally:
            with cls._lock:
                cls.in_flight -= 1


@contextmanager
def slow_store(
    files: dict[str, bytes],
    seconds: float = 0.0,
    fails: Callable[[str, int], Exception | None] = lambda name, start: None,
) -> Iterator[type[SlowStore]]:
    """A store with these files, `slow://NAME`; its counts are those since it was made."""
    fsspec.register_implementation("slow", SlowStore, clobber=True)
    SlowStore.files, SlowStore.seconds, SlowStore.fails = files, seconds, staticmethod(fails)
    SlowStore.in_flight = SlowStore.most_in_flight = SlowStore.num_requests = 0
    yield SlowStore
