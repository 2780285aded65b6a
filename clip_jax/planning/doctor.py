"""`clip-jax doctor`: what can be known of a run in seconds, before it is started."""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from clip_jax.config.errors import UserError
from clip_jax.planning.doctor_case import Case, Checks, Finding, Level
from clip_jax.planning.doctor_devices import device_checks, machine_checks
from clip_jax.planning.doctor_machine import Machine

SECONDS = 9.0  # for all checks together
DEVICE_SECONDS = 7.0  # for JAX to name its devices: the other checks go on meanwhile


class Part(NamedTuple):
    """Checks that follow each other; the parts run side by side, as each waits for other things."""

    names: tuple[str, ...]
    make: Callable[[], Checks]


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What all checks found, in their order, and how long each took."""

    findings: list[Finding]
    seconds: dict[str, float]
    unfinished: tuple[str, ...] = ()  # checks that still wait for something

    def count(self, level: str) -> int:
        return sum(finding.level == level for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "findings": [finding._asdict() for finding in self.findings],
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


def diagnose(case: Case, *, seconds: float = SECONDS) -> Diagnosis:
    """Runs all checks, whatever any of them finds. seconds: what has not ended then is told."""
    return run_parts(parts_of(case), seconds)


def parts_of(case: Case) -> tuple[Part, ...]:
    """All checks. What they import is imported where they run: it may be what is broken."""

    def data() -> Checks:
        from clip_jax.planning.doctor_data import data_checks

        return data_checks(case)

    def run() -> Checks:
        from clip_jax.planning.doctor_run import run_checks

        return run_checks(case)

    return (
        Part(("versions", "devices", "precision", "mesh"), lambda: device_checks(case)),
        Part(("cache", "tokenizer", "sources", "samples", "captions", "evaluation"), data),
        Part(("state", "workdir", "lock", "checkpoints", "start", "room", "memory"), run),
    )


def diagnose_machine(machine: Machine, *, seconds: float = SECONDS) -> Diagnosis:
    """The checks that need no config."""
    return run_parts((Part(("versions", "devices"), lambda: machine_checks(machine)),), seconds)


def run_parts(parts: Sequence[Part], seconds: float) -> Diagnosis:
    """As `diagnose`."""
    found: dict[str, list[Finding]] = {}
    took: dict[str, float] = {}
    end = time.monotonic() + seconds
    # Daemons: one that waits for a dead disk would keep the process from ending.
    threads = [
        threading.Thread(target=_run_part, args=(part, found, took), daemon=True) for part in parts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    findings: list[Finding] = []
    unfinished = []
    for name in (name for part in parts for name in part.names):
        if name in took:
            findings += found[name]
            continue
        unfinished.append(name)
        text = (
            f"not done in {seconds:g} s: storage that does not answer, or a set that is listed or "
            "built for the first time; `clip-jax data check` takes the time it needs"
        )
        findings += [*found.get(name, []), Finding("warning", name, text)]
    return Diagnosis(findings, took, tuple(unfinished))


def _run_part(part: Part, found: dict[str, list[Finding]], took: dict[str, float]) -> None:
    started = time.monotonic()
    try:
        checks = part.make()
    except Exception as error:  # noqa: BLE001 - packages that do not go together raise anything
        for name in part.names:
            found[name], took[name] = [_unable(name, error)], 0.0
        return
    for name, check in checks.items():
        found[name] = []
        try:
            found[name] += check()
        except UserError as error:
            found[name].append(Finding("error", name, str(error)))
        except Exception as error:  # noqa: BLE001 - all checks run, whatever becomes of one
            found[name].append(_unable(name, error))
        took[name] = time.monotonic() - started
        started = time.monotonic()


def _unable(name: str, error: Exception) -> Finding:
    """A check that could not be made: a fault that another one names, or one of doctor's own."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    level: Level = "warning" if isinstance(error, TimeoutError) else "error"
    return Finding(level, name, f"cannot be checked: {text}")
