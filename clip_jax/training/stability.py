"""When a loss is too far off: a robust z-score, and the error that sends a run back."""

import collections
import math
import statistics
from collections.abc import Iterable

from clip_jax.config import StabilityConfig, UserError

# The standard deviation of a normal distribution, of its median absolute deviation.
_DEVIATIONS = 1.4826
# Below this share of the median a deviation is rounding, as in a run that has converged.
_LEAST_SHARE = 1e-3


class LossSpikeError(Exception):
    """A loss that `StabilityConfig` does not accept: the run goes back to before it."""

    def __init__(self, step: int, loss: float, zscore: float) -> None:
        super().__init__(f"loss {loss:.4f} at step {step} is {zscore:.1f} deviations above normal")
        self.step, self.loss, self.zscore = step, loss, zscore


class SpikeDetector:
    """Compares the loss of each step with the median of those before it.

    losses: of the last steps, oldest first, as `losses` of the one that a checkpoint was saved
    with: a resumed run judges as one that never stopped.
    """

    def __init__(self, config: StabilityConfig, losses: Iterable[float] = ()) -> None:
        self._limit = config.spike_zscore
        self._window = collections.deque(losses, maxlen=config.spike_window)

    @property
    def losses(self) -> list[float]:
        return list(self._window)

    def check(self, step: int, loss: float) -> None:
        """Raises LossSpikeError where `loss` is a spike; else it becomes part of what is normal.

        The score is (loss - median) / (1.4826 median absolute deviation), over a full window. A
        loss that is not finite is no spike: its update was left out.
        """
        if self._limit is None or not math.isfinite(loss):
            return
        if len(self._window) == self._window.maxlen:
            median = statistics.median(self._window)
            spread = statistics.median(abs(value - median) for value in self._window)
            deviation = max(_DEVIATIONS * spread, _LEAST_SHARE * abs(median))
            zscore = (loss - median) / deviation if deviation else 0.0
            if zscore > self._limit:
                raise LossSpikeError(step, loss, zscore)
        self._window.append(loss)


def check_skipped(config: StabilityConfig, step: int, in_row: int) -> None:
    """Raises UserError where too many updates in a row were left out."""
    if in_row >= config.max_skipped_steps:
        raise UserError(
            f"the last {in_row} updates up to step {step} had a loss or gradients that are not "
            "finite and were left out; lower config.optimizer.learning_rate, use "
            "config.precision=float32, or pass over the samples with config.data.skipped_ranges "
            "(config.stability.max_skipped_steps is the limit)"
        )
