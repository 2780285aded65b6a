"""Worker processes: what they find when they start, how they end, and waiting for them."""

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from typing import Self

from absl import flags

logger = logging.getLogger(__name__)

_VARIABLE = "JAX_PLATFORMS"


class WorkerEnvironment:
    """Keeps JAX in processes started from now on off the accelerator, until `restore` is called.

    Grain imports JAX in its workers before any function of ours runs there, so the environment has
    to say it; and it starts them behind the first `next`, so the environment has to say it for a
    while. In this process JAX has read the variable long ago. Several may be in force at a time.
    """

    _lock = threading.Lock()
    _in_force = 0
    _before: str | None = None

    def __init__(self) -> None:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own; the command line has none
        self._restored = False
        cls = WorkerEnvironment
        with cls._lock:
            if cls._in_force == 0:
                cls._before = os.environ.get(_VARIABLE)
            cls._in_force += 1
            os.environ[_VARIABLE] = "cpu"

    def restore(self) -> None:
        """Give the variable its old value back once nobody else needs it."""
        cls = WorkerEnvironment
        with cls._lock:
            if self._restored:
                return
            self._restored = True
            cls._in_force -= 1
            if cls._in_force:
                return
            if cls._before is None:
                os.environ.pop(_VARIABLE, None)
            else:
                os.environ[_VARIABLE] = cls._before


def prepare_worker(worker_index: int, num_workers: int) -> None:
    """Make this worker process tokenize in its own threads, and end when its parent is gone.

    Grain's workers (0.2.18) would wait for ever for a parent that was killed, and hold their
    memory. The tokenizers library would start a thread for each core in each of the workers.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a worker process"

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


def was_killed(error: RuntimeError) -> bool:
    """Whether Grain (0.2.18) means by this error that a worker ended without saying why."""
    return str(error).startswith("Worker process was terminated unexpectedly")


class SlowWait:
    """A `with` statement round a wait: logs a warning where it takes long, and never raises.

    first_seconds: of the first warning; each further one takes twice as long again.
    describe: completes 'waiting ...', called from another thread.
    """

    def __init__(self, first_seconds: float, describe: Callable[[], str]) -> None:
        self._first_seconds = first_seconds
        self._describe = describe
        self._since: float | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="slow-wait", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._since = None

    def close(self) -> None:
        """End the thread that watches."""
        self._closed.set()

    def _watch(self) -> None:
        waited_for, due = None, self._first_seconds
        while not self._closed.wait(self._first_seconds / 8):
            since = self._since
            if since != waited_for:
                waited_for, due = since, self._first_seconds
            if since is None:
                continue
            seconds = time.monotonic() - since
            if seconds >= due:
                due = 2 * seconds
                logger.warning("waiting %.0f s %s", seconds, self._describe())
