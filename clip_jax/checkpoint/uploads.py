"""Work for a bucket that is done beside the training: now and then, and again where it failed."""

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from clip_jax.checkpoint.paths import AnyPath, BucketPath

_log = logging.getLogger(__name__)

# `flush` waits so long at most: a store that does not answer must not hold up the training.
_FLUSH_SECONDS = 30.0
# Before the attempts that `close` makes after its first.
_LAST_WAITS = (1.0, 4.0, 16.0)
# A file that grows for days is written whole each time: the larger, the more seldom.
_BYTES_PER_SECOND = 2**20


class Background:
    """Calls `work` in a thread: every `seconds`, and when asked.

    An error of it never reaches the caller: one of a row is logged, as `what` and the reason, and
    the work is tried again when it is due next.
    """

    def __init__(self, work: Callable[[], None], seconds: float, *, what: str) -> None:
        self._work = work
        self._seconds = seconds
        self._what = what
        self._failed = False
        self._asked = self._done = 0
        self._ends = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._thread.start()

    def flush(self) -> bool:
        """Does the work now; False where it failed or takes longer than 30 s."""
        with self._changed:
            self._asked += 1
            mine = self._asked
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._done >= mine, _FLUSH_SECONDS)
            return done and not self._failed

    def close(self) -> bool:
        """Does the work for the last time, in several attempts; False where all failed."""
        if self._ends:
            return True
        done = self.flush()
        for wait in _LAST_WAITS:
            if done:
                break
            time.sleep(wait)
            done = self.flush()
        self.stop()
        return done

    def stop(self) -> None:
        """Ends the thread, without doing the work again."""
        with self._changed:
            self._ends = True
            self._changed.notify_all()
        self._thread.join(_FLUSH_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._ends or self._asked > self._done, self._seconds
                )
                if self._ends:
                    return
                asked = self._asked
            failed = True
            try:
                self._work()
                failed = False
            except Exception as error:  # noqa: BLE001 - nothing here may end the run
                if not self._failed:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    _log.warning("%s: %s; it is tried again", self._what, reason)
            if self._failed and not failed:
                _log.warning("%s: it works again", self._what)
            with self._changed:
                self._failed = failed
                self._done = asked
                self._changed.notify_all()


class UploadedFolder:
    """A local folder to write into, for what knows no buckets: TensorBoard, the profiler.

    `path` is `target` itself where that is local; for a bucket it is a temporary folder, of which
    files that have changed are copied to `target` every `seconds` (large ones more seldom: 1 MiB
    for each second) and at `close`, which removes it.
    """

    def __init__(self, target: AnyPath, seconds: float) -> None:
        self._background: Background | None = None
        if isinstance(target, Path):
            self.path = target
            return
        self.path = Path(tempfile.mkdtemp(prefix="clip-jax-"))
        self._target = target
        self._versions: dict[Path, tuple[int, int]] = {}  # size and time of change, as uploaded
        self._due: dict[Path, float] = {}
        self._closes = False
        self._background = Background(self._upload, seconds, what=f"copying to {target}")

    def close(self) -> None:
        if self._background is None:
            return
        self._closes = True
        if self._background.close():
            shutil.rmtree(self.path)
        else:
            _log.warning("%s is not complete; the rest of it is in %s", self._target, self.path)
        self._background = None

    def _upload(self) -> None:
        for file in sorted(path for path in self.path.rglob("*") if path.is_file()):
            stat = file.stat()
            version = (stat.st_size, stat.st_mtime_ns)
            late = self._closes or time.monotonic() >= self._due.get(file, 0.0)
            if self._versions.get(file) == version or not late:
                continue
            target: BucketPath = self._target
            for part in file.relative_to(self.path).parts:
                target = target / part
            target.upload(file)
            self._versions[file] = version
            self._due[file] = time.monotonic() + stat.st_size / _BYTES_PER_SECOND
