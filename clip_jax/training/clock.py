"""How long steps take, and how much of it is waiting for data."""

import contextlib
import time
from collections.abc import Iterator, Mapping

import jax

from clip_jax.data.report import STAGES


class Clock:
    """Time since the last log line and the share of it spent waiting for data."""

    def __init__(self, start: float, first_step: int, *, earlier: float) -> None:
        """start: of this call of `train`; earlier: seconds the run trained before it."""
        self._run_start = start - earlier
        self._lap_start = time.perf_counter()
        self._lap_step = first_step
        self._waited = self._transferred = 0.0

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
        start = time.perf_counter()
        yield
        if in_flight is None or in_flight.is_ready():  # type: ignore[attr-defined]
            self._waited += time.perf_counter() - start

    def lap(self, step: int, *, local_batch_size: int) -> dict[str, float]:
        """Figures from the last lap to now, when step `step` is known to be done.

        local_batch_size: samples of a step that this process transfers.
        """
        now = time.perf_counter()
        seconds = max(now - self._lap_start, 1e-9)
        samples = (step - self._lap_step) * local_batch_size
        wait = min(self._waited / seconds, 1.0)
        figures = {
            "steps_per_second": (step - self._lap_step) / seconds,
            "data_wait": wait,
            "data_wait/transfer": min(self._transferred / seconds, wait),
            "train_seconds": now - self._run_start,
            "data/transfer_ms": 1000 * self._transferred / (samples or 1),
        }
        self._lap_start, self._lap_step = now, step
        self._waited = self._transferred = 0.0
        return figures

    def skip(self) -> None:
        """Leaves the time since the last lap out of the next one's figures."""
        self._lap_start = time.perf_counter()


def split_wait(figures: Mapping[str, float]) -> dict[str, float]:
    """`data_wait` less the transfer, shared out over the stages by the time that a sample takes.

    figures: `data_wait`, `data_wait/transfer` and `data/STAGE_ms` of each stage. The stages
    overlap, so what a wait was for is not known: that with most of the work is the one to mend.
    """
    stages = {stage: figures[f"data/{stage}_ms"] for stage in STAGES}
    total = sum(stages.values()) or 1.0
    left = figures["data_wait"] - figures["data_wait/transfer"]
    return {f"data_wait/{stage}": left * ms / total for stage, ms in stages.items()}
