"""How long steps take, and where the rest of the time goes."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Literal

import jax

from clip_jax.data.report import STAGES
from clip_jax.training.goodput import Session
from clip_jax.training.recompiles import CompileWatch

Spent = Literal["checkpoint", "evaluation", "compile"]


class Clock:
    """The time since the last log line: steps, waiting for data, saving, scoring, compiling."""

    def __init__(self, first_step: int, *, session: Session, compiles: CompileWatch) -> None:
        """session: begun. compiles: what JAX compiles in the loop, wherever that happens."""
        self._session, self._compiles = session, compiles
        self._start_lap(first_step, time.perf_counter())

    @contextlib.contextmanager
    def transferring(self) -> Iterator[None]:
        """Round the transfer of a batch to the devices, as far as this thread takes part."""
        start = time.perf_counter()
        yield
        self._transferred += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting(self, in_flight: jax.Array | None) -> Iterator[None]:
        """Round a wait for data. It counts if the step before, `in_flight`, ends within it.

        Then the device stood idle for a part of it, which makes the figure an upper bound.
        """
        start, compiled = time.perf_counter(), self._compiles.seconds
        yield
        if in_flight is None or in_flight.is_ready():  # type: ignore[attr-defined]
            self._waited += self._since(start, compiled)

    @contextlib.contextmanager
    def spending(self, kind: Spent) -> Iterator[None]:
        """Round what holds the steps up. What JAX compiles in it counts as such, and is expected.

        The devices should be idle when it begins: a step that it waits for would count as its own.
        """
        start, compiled = time.perf_counter(), self._compiles.seconds
        with self._compiles.expected():
            try:
                yield
            finally:
                self._spent[kind] += self._since(start, compiled)

    def lap(self, step: int, *, local_batch_size: int) -> dict[str, float]:
        """Figures from the last lap to now, when step `step` is known to be done.

        `time/...` are shares of all of it and add up to 1. Rates, and the shares of `data_wait`,
        are of training alone: without saving, scoring and compiling.
        local_batch_size: samples of a step that this process transfers.
        """
        now = time.perf_counter()
        seconds = max(now - self._lap_start, 1e-9)
        self._spent["compile"] += self._compiles.seconds - self._lap_compiled
        shares = {"data_wait": min(self._waited / seconds, 1.0)}
        shares |= {kind: min(spent / seconds, 1.0) for kind, spent in self._spent.items()}
        stepping = max(1.0 - sum(shares.values()), 0.0)
        training = max(seconds * (stepping + shares["data_wait"]), 1e-9)
        wait = min(self._waited / training, 1.0)
        samples = (step - self._lap_step) * local_batch_size
        figures = {
            "steps_per_second": (step - self._lap_step) / training,
            "data_wait": wait,
            "data_wait/transfer": min(self._transferred / training, wait),
            "data/transfer_ms": 1000 * self._transferred / (samples or 1),
            "time/step": stepping,
            **{f"time/{kind}": share for kind, share in shares.items()},
            "compile_seconds": self._compiles.seconds,
            **self._session.figures(stepping * seconds),
        }
        self._start_lap(step, now)
        return figures

    def _start_lap(self, step: int, now: float) -> None:
        self._lap_start, self._lap_step, self._lap_compiled = now, step, self._compiles.seconds
        self._waited = self._transferred = 0.0
        self._spent: dict[Spent, float] = {"checkpoint": 0.0, "evaluation": 0.0, "compile": 0.0}

    def _since(self, start: float, compiled: float) -> float:
        """Seconds since `start`, less those in which JAX compiled."""
        return max(time.perf_counter() - start - (self._compiles.seconds - compiled), 0.0)


def split_wait(figures: Mapping[str, float]) -> dict[str, float]:
    """`data_wait` less the transfer, shared out over the stages by the time that a sample takes.

    figures: `data_wait`, `data_wait/transfer` and `data/STAGE_ms` of each stage. The stages
    overlap, so what a wait was for is not known: that with most of the work is the one to mend.
    """
    stages = {stage: figures[f"data/{stage}_ms"] for stage in STAGES}
    total = sum(stages.values()) or 1.0
    left = figures["data_wait"] - figures["data_wait/transfer"]
    return {f"data_wait/{stage}": left * ms / total for stage, ms in stages.items()}
