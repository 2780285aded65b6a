"""What the checks of `clip-jax doctor` are given, and what they say."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from clip_jax.config import ExperimentConfig
from clip_jax.config.errors import UserError
from clip_jax.planning.doctor_machine import Machine

if TYPE_CHECKING:
    from clip_jax.checkpoint import Workdir

Level = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """One line: what was looked at, what was found in numbers, and what to do about it."""

    level: Level
    check: str
    text: str


Checks = dict[str, Callable[[], Iterator[Finding]]]  # by name, in the order in which they run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A run that is about to be started."""

    config: ExperimentConfig  # validated
    machine: Machine  # this one
    workdir: "Workdir | None" = None  # None: not given
    num_devices: int | None = None  # of the whole run, on other machines; None: those here
    num_hosts: int = 1

    @property
    def elsewhere(self) -> bool:
        """Whether the run is to be on other machines than this one."""
        return self.num_devices is not None

    def count_devices(self) -> int:
        """Of the whole run. Raises as `Machine.devices` does."""
        if self.num_devices is not None:
            return self.num_devices
        return self.machine.devices().count * self.num_hosts


def refusals(check: str, work: Callable[[], object]) -> Iterator[Finding]:
    """An error where `work` raises UserError: what follows is looked at all the same."""
    try:
        work()
    except UserError as error:
        yield Finding("error", check, str(error))


def nearest_existing(path: Path) -> Path:
    """The folder, or the one above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def is_writable(path: Path) -> bool:
    """Whether a folder can be written or made; nothing is made."""
    nearest = nearest_existing(path)
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def counted(number: int, what: str) -> str:
    """`1 error`, `1,200 errors`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def size(num_bytes: float) -> str:
    """`1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB" if num_bytes < 1000 else f"{num_bytes:,.0f} TB"
