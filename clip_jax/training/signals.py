"""Being told to stop: Ctrl-C, SIGTERM and what preempts machines."""

import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from clip_jax.checkpoint import Workdir


class Interrupts:
    """Whether the run was told to stop."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.waits = False  # for the end of a step, to save it

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Round steps, each of which can be saved: they are told, not broken off."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Ctrl-C and SIGTERM, from the start of a run to its end.

    Round steps they are noted, and a second Ctrl-C ends the process at once. Elsewhere, where
    there is nothing to save, they raise KeyboardInterrupt. With several processes Ctrl-C becomes
    SIGTERM, which JAX's preemption service brings to all of them, so that they stop at the same
    step.
    """
    interrupted = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def handle(signum: int, frame: Any) -> None:
        again = interrupted.event.is_set()
        # Noted first: JAX swallows what is raised in some of its callbacks.
        interrupted.event.set()
        if jax.process_count() > 1 and not again:
            signal.raise_signal(signal.SIGTERM)
        elif not interrupted.waits or (again and signum == signal.SIGINT):
            raise KeyboardInterrupt

    # JAX's own handler must stay in place for SIGTERM where it coordinates processes.
    signals = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
    old = {number: signal.signal(number, handle) for number in signals}
    try:
        yield interrupted
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def should_stop(interrupted: Interrupts, step: int) -> bool:
    """Whether all processes stop after `step`."""
    if jax.process_count() == 1:
        return interrupted.event.is_set()
    return multihost_utils.reached_preemption_sync_point(step)


def how_to_resume(workdir: Workdir, step: int) -> str:
    # As it was called: by the installed script, or as a module.
    script = Path(sys.argv[0])
    program = [str(script)] if script.name == "clip-jax" else [sys.executable, "-m", "clip_jax.cli"]
    command = [*program, "train", f"--config={workdir.config}", f"--workdir={workdir.path}"]
    return f"stopped at step {step}, saved. To go on: {shlex.join(command)}"
