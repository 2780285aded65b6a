"""One process trains in a workdir at a time."""

import fcntl
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from clip_jax.checkpoint.paths import AnyPath, BucketPath
from clip_jax.checkpoint.uploads import Background
from clip_jax.config import UserError

_log = logging.getLogger(__name__)

# The owner of a lock in a bucket writes it again so often, and is given up for dead after so long:
# what a run that was killed on another machine has to wait for at most.
_REFRESH_SECONDS = 15.0
_STALE_SECONDS = 60.0
_POLL_SECONDS = 5.0


class Lock(Protocol):
    """What `Workdir.lock` gives: the workdir is this process's own until `close`."""

    def check(self) -> None:
        """Raises UserError where another process has taken the workdir over. Makes no request."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def lock(folder: AnyPath) -> Lock:
    """Keeps other processes from training in `folder`. Raises UserError where one does already."""
    return _FileLock(folder) if isinstance(folder, Path) else BucketLock(folder)


class _FileLock:
    """The system's lock of a local file, which it gives back when the process ends, however."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / ".lock").open("a")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"another process trains in {folder}; wait for it or use another --workdir"
            ) from None
        except OSError as error:  # Lustre without the flock option, NFS without a lock daemon
            _log.warning(
                "the file system of %s has no locks (%s): nothing keeps a second process from "
                "training there",
                *(folder, error.strerror),
            )

    def check(self) -> None:
        """Nothing: it cannot be taken away."""

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Held(NamedTuple):
    """A lock as it lies in the bucket."""

    number: int
    path: BucketPath
    text: str
    owner: dict[str, Any]  # {} where the text is not ours


class BucketLock:
    """A lock made of objects, `FOLDER/lock/NUMBER.json`: who has the highest number has it.

    An object is made only where there is none of that number: gs:// and s3:// let one of several
    processes do that. The owner writes it again every 15 s. A lock that nobody has written for
    60 s, by the clock of the store, or whose process is gone from this machine, is taken over under
    the next number. An owner that was given up for dead, and was not, finds the higher number at
    its next refresh, and `check` raises: until then both may write.

    Raises UserError where the owner is alive. wait: sleeps between two looks at the lock.
    """

    def __init__(self, folder: BucketPath, *, wait: Callable[[float], None] = time.sleep) -> None:
        self._folder = folder
        self._token = secrets.token_hex(8)
        self._num_refreshes = 0
        self._taken_by: dict[str, Any] | None = None
        self._closed = False
        self._wait = wait
        number = self._free_number()
        self._path = folder / "lock" / f"{number:06d}.json"
        try:
            self._path.write_bytes(self._content(), exclusive=True)
        except FileExistsError:
            raise self._refused("has started there at the same moment") from None
        held = self._locks()
        if not self._owns(held[-1]):
            self._path.unlink(missing_ok=True)
            raise self._refused("has started there at the same moment")
        for other in held[:-1]:
            other.path.unlink(missing_ok=True)
        self._background = Background(
            self.refresh, _REFRESH_SECONDS, what=f"refreshing the lock {self._path}"
        )

    def check(self) -> None:
        if self._taken_by is not None:
            raise UserError(
                f"another process ({_describe(self._taken_by)}) has taken over {self._folder}: "
                f"this one did not reach the bucket for {_STALE_SECONDS:.0f} s; it stops"
            )

    def refresh(self) -> None:
        """Tells others that this process is alive, and looks whether it still has the lock."""
        if self._taken_by is not None:
            return
        held = self._locks()
        if not held or not self._owns(held[-1]):
            self._taken_by = held[-1].owner if held else {}
            _log.error("%s: another process has taken it over", self._folder)
            return
        self._num_refreshes += 1
        self._path.write_bytes(self._content())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._background.stop()
        try:
            # Another's may lie under the same number, if this one was given up for dead.
            if any(held.path == self._path and self._owns(held) for held in self._locks()):
                self._path.unlink(missing_ok=True)
        except UserError as error:  # it is stale in a minute
            _log.warning("%s", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _free_number(self) -> int:
        """The number that is ours to take, when the owner of the one before is dead or gone."""
        held = self._locks()
        if not held:
            return 1
        newest = held[-1]
        dead = _is_dead_here(newest.owner)
        if dead is False:
            raise self._refused(f"({_describe(newest.owner)}) trains there", found=True)
        if dead is None:
            age = self._age(newest.path)
            rest = _STALE_SECONDS - age
            if rest > 0:
                _log.warning(
                    "%s is locked by %s; waiting %.0f s to see whether that still runs",
                    *(self._folder, _describe(newest.owner), rest),
                )
            while rest > 0:
                self._wait(min(rest, _POLL_SECONDS))
                rest -= _POLL_SECONDS
                held = self._locks()
                if not held:
                    return 1
                if (held[-1].number, held[-1].text) != (newest.number, newest.text):
                    raise self._refused(f"({_describe(held[-1].owner)}) trains there", found=True)
        _log.warning(
            "%s: taking over from %s, which is dead", self._folder, _describe(newest.owner)
        )
        return newest.number + 1

    def _age(self, path: BucketPath) -> float:
        """Seconds since an object was written, by the store's own clock; 0 if it does not say."""
        probe = self._folder / "lock" / f"clock-{self._token}"
        probe.write_text("")
        try:
            now, then = probe.modified(), path.modified()
        except FileNotFoundError:  # its owner has just ended
            return 0.0
        finally:
            probe.unlink(missing_ok=True)
        return 0.0 if now is None or then is None else (now - then).total_seconds()

    def _owns(self, held: _Held) -> bool:
        return held.owner.get("token") == self._token

    def _locks(self) -> list[_Held]:
        """Those in the bucket, in order of numbers."""
        held = []
        for path in (self._folder / "lock").iterdir():
            if not path.name.removesuffix(".json").isdecimal():
                continue
            try:
                text = path.read_text(errors="replace")
            except FileNotFoundError:
                continue
            try:
                owner = json.loads(text)
            except json.JSONDecodeError:
                owner = {}
            number = int(path.name.removesuffix(".json"))
            held.append(_Held(number, path, text, owner if isinstance(owner, dict) else {}))
        return sorted(held, key=lambda lock: lock.number)

    def _content(self) -> bytes:
        content = {
            "token": self._token,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "refreshes": self._num_refreshes,
            **_this_process(),
        }
        return (json.dumps(content) + "\n").encode()

    def _refused(self, what: str, *, found: bool = False) -> UserError:
        remedy = "stop it" if found else "wait for it"
        return UserError(
            f"another process {what}: {self._folder}; {remedy} or use another --workdir"
        )


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "an unknown process"
    return f"process {owner.get('pid')} on {owner.get('host')}, last seen {owner.get('time')}"


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "machine": _machine(),
        "started": _started(pid),
    }


def _machine() -> str | None:
    """What tells this machine, since it was booted, and this container on it from all others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return None


def _started(pid: int) -> str | None:
    """When a process began, in clock ticks since boot; None where there is none of that number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]  # field 22 of proc_pid_stat(5)


def _is_dead_here(owner: dict[str, Any]) -> bool | None:
    """Whether a process of this machine has ended; None where that cannot be told from here."""
    if owner.get("machine") is None or owner["machine"] != _machine():
        return None
    pid = owner.get("pid")
    return None if not isinstance(pid, int) else _started(pid) != owner.get("started")
