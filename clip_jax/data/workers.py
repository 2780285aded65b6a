"""What worker processes find when they start."""

import os
import threading

from absl import flags

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
