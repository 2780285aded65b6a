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


@contextlib.contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Sets the event on Ctrl-C or SIGTERM; a second Ctrl-C ends the process at once.

    With several processes Ctrl-C becomes SIGTERM, which JAX's preemption service brings to all of
    them, so that they stop at the same step.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(signum: int, frame: Any) -> None:
        if event.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)

    # JAX's own handler must stay in place for SIGTERM where it coordinates processes.
    signals = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
    old = {number: signal.signal(number, handle) for number in signals}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def should_stop(interrupted: threading.Event, step: int) -> bool:
    """Whether all processes stop after `step`."""
    if jax.process_count() == 1:
        return interrupted.is_set()
    return multihost_utils.reached_preemption_sync_point(step)


def how_to_resume(workdir: Workdir, step: int) -> str:
    # As it was called: by the installed script, or as a module.
    script = Path(sys.argv[0])
    program = [str(script)] if script.name == "clip-jax" else [sys.executable, "-m", "clip_jax.cli"]
    command = [*program, "train", f"--config={workdir.config}", f"--workdir={workdir.path}"]
    return f"stopped at step {step}, saved. To go on: {shlex.join(command)}"
