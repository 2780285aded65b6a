"""When a run is saved."""

import time

from clip_jax.config import ExperimentConfig
from clip_jax.parallel import from_first_process


class SaveTimes:
    """Every N steps, every M minutes, before what may be the best, and after the last step.

    All processes decide alike.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self._config = config
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after `step`. Minutes are looked at when a log line is due.

        A collective at those steps, where minutes are asked for: clocks of hosts differ.
        """
        checkpoint, logging = self._config.checkpoint, self._config.logging
        due = step == self._config.num_steps or step % checkpoint.every_steps == 0
        if checkpoint.keep_best:  # what is scored must be there to be kept
            due = due or step % self._config.evaluation.every_steps == 0
        if checkpoint.every_minutes is not None and step % logging.every_steps == 0:
            late = time.monotonic() - self._last >= 60 * checkpoint.every_minutes
            due = bool(from_first_process(late)) or due
        return due

    def saved(self) -> None:
        self._last = time.monotonic()
