"""The folder of a run's checkpoints: which are there, how one appears, and how one goes.

    30/                  a complete checkpoint: it has a checksums.json
    40.saving*           one that is being saved, or was when the process was killed
    10.deleting          one that is being deleted, likewise
    20.damaged           one that was found damaged: moved aside, for the user to look at or delete

On a local disk a checkpoint appears by a rename. A bucket has none: there it is written in place
and its checksums.json comes last.
"""

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from clip_jax.checkpoint.folders import move, names_in, remove
from clip_jax.checkpoint.paths import AnyPath, BucketPath
from clip_jax.checkpoint.reading import ArrayReader
from clip_jax.checkpoint.record import (
    NAME,
    Record,
    file_problems,
    read_record,
    write_record,
)
from clip_jax.config import UserError

_SAVING, _DELETING, _DAMAGED = ".saving", ".deleting", ".damaged"
_COMMITTED = "commit_success.txt"  # Orbax's, when it is done


class Shelf:
    """Complete checkpoints by step. Without JAX devices: reading changes nothing."""

    def __init__(self, directory: AnyPath) -> None:
        self.directory = directory

    def path(self, step: int) -> AnyPath:
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """Of complete checkpoints, ascending; some may be damaged since."""
        numbered = self.numbered()
        with ThreadPoolExecutor(16) as threads:
            complete = threads.map(lambda step: (self.path(step) / NAME).exists(), numbered)
            return [step for step, is_there in zip(numbered, complete, strict=True) if is_there]

    def numbered(self) -> list[int]:
        """Steps that have a folder, complete or not."""
        return sorted(int(name) for name in names_in(self.directory) if name.isdecimal())

    def damaged(self) -> list[str]:
        """Names of what was moved aside."""
        return [name for name in names_in(self.directory) if _DAMAGED in name]

    # ---- Saving ----------------------------------------------------------------------------------

    def being_saved(self, step: int) -> AnyPath:
        """Where Orbax is to save `step`."""
        if isinstance(self.directory, BucketPath):
            return self.path(step)
        return self.directory / f"{step}{_SAVING}"

    def complete(self, step: int, *, num_processes: int, groups: Iterable[str]) -> None:
        """Makes a checkpoint of what all processes have saved: from here on it counts."""
        saved = self.being_saved(step)
        write_record(
            saved, step=step, saved_at=time.time(), num_processes=num_processes, groups=groups
        )
        if saved != self.path(step):
            move(saved, self.path(step))

    def clean(self) -> None:
        """Removes what a killed process left half saved or half deleted. For the one that saves."""
        for name in names_in(self.directory):
            if _SAVING in name or name.endswith(_DELETING):
                remove(self.directory / name)
        if isinstance(self.directory, BucketPath):
            for step in self.numbered():
                # There is no rename: what has not got its last object yet does not count.
                if not (self.path(step) / NAME).exists():
                    remove(self.path(step))

    # ---- Going -----------------------------------------------------------------------------------

    def delete(self, step: int) -> None:
        """Whole or, should this process be killed, no longer complete: never half."""
        path = self.path(step)
        if not path.exists():
            return
        if isinstance(path, BucketPath):
            for name in (NAME, _COMMITTED):
                (path / name).unlink(missing_ok=True)
        else:
            path = self.directory / f"{step}{_DELETING}"
            remove(path)
            move(self.path(step), path)
        remove(path)

    def set_aside(self, step: int) -> AnyPath:
        """Renames a damaged checkpoint, so that it counts no more."""
        names = names_in(self.directory)
        free = next(
            name
            for number in range(1, len(names) + 2)
            if (name := f"{step}{_DAMAGED}{f'-{number}' if number > 1 else ''}") not in names
        )
        move(self.path(step), self.directory / free)
        return self.directory / free

    def delete_damaged(self) -> None:
        for name in self.damaged():
            remove(self.directory / name)

    # ---- Checking --------------------------------------------------------------------------------

    def quick_problem(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint; large ones are looked at by size alone."""
        try:
            problems = file_problems(self.path(step), read_record(self.path(step)))
        except UserError as error:
            return str(error)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return f"{problems[0]}{more}" if problems else None

    def verify(self, step: int) -> list[str]:
        """All that is wrong with a checkpoint: each file, then each part of each array."""
        path = self.path(step)
        try:
            record: Record = read_record(path)
        except UserError as error:
            return [str(error)]
        return [*file_problems(path, record), *ArrayReader(path, record).problems()]

    def newest_whole(self) -> int | None:
        """By `verify`: all of its files are read."""
        return next((step for step in reversed(self.steps()) if not self.verify(step)), None)
