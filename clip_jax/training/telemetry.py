"""Where the numbers of a run go: metrics.jsonl, TensorBoard, Weights & Biases, a progress line."""

import hashlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from clip_jax.checkpoint import Workdir
from clip_jax.config import ExperimentConfig, UserError, to_dict

_WAIT_TO_EXPLAIN = 0.05  # share of the time


def check_logging(config: ExperimentConfig) -> None:
    """Raises UserError where the config asks for a package that is not installed."""
    if config.logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "config.logging.wandb_project is set but wandb is not installed: "
            "pip install 'clip-jax-training[wandb]'"
        )


class MetricsWriter:
    """Writes each line of metrics to every place the config asks for."""

    def __init__(self, workdir: Workdir, config: ExperimentConfig, *, first_step: int) -> None:
        """first_step: the step the run starts from; TensorBoard hides what came after it."""
        self._file = workdir.metrics.open("a", buffering=1)
        self._tensorboard: Any = None
        self._wandb: Any = None
        if config.logging.tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(workdir.tensorboard), purge_step=first_step or None
            )
        if config.logging.wandb_project is not None:
            import wandb

            self._wandb = wandb.init(
                project=config.logging.wandb_project,
                name=workdir.path.name,
                # Resumes the run of this very folder, not one of the same name elsewhere.
                id=hashlib.sha256(str(workdir.path).encode()).hexdigest()[:16],
                resume="allow",
                dir=str(workdir.path),
                config=to_dict(config),
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """values: plain numbers by name. A number that is not finite is written as null."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class ProgressLine:
    """One live line on a terminal; elsewhere a plain line now and then."""

    _SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, *, first_step: int, num_steps: int, silent: bool = False) -> None:
        """silent: for all processes of a run but the first."""
        self._console = Console(file=sys.stderr, quiet=silent)
        self._silent = silent
        self._num_steps = num_steps
        self._last_line = -math.inf
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            disable=silent or not self._console.is_terminal,
        )
        self._bar = self._progress.add_task(
            "train", total=num_steps, completed=first_step, numbers="compiling"
        )
        self._progress.start()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """values: loss, samples_per_second, data_wait (share of time), eta_seconds.

        Where waiting for data shows, the stage with the most of it is named: `data_wait/STAGE`.
        """
        stages = {
            key.removeprefix("data_wait/"): share
            for key, share in values.items()
            if key.startswith("data_wait/")
        }
        why = ""
        if stages and values["data_wait"] > _WAIT_TO_EXPLAIN:
            why = f" ({max(stages, key=stages.__getitem__)})"
        numbers = (
            f"loss {values['loss']:.4f}  {values['samples_per_second']:,.0f} samples/s  "
            f"data wait {values['data_wait']:.0%}{why}"
        )
        self._progress.update(self._bar, completed=step, numbers=numbers)
        now = time.monotonic()
        plain = not self._console.is_terminal and not self._silent
        due = now - self._last_line > self._SECONDS_BETWEEN_LINES or step == self._num_steps
        if plain and due:
            self._last_line = now
            eta = time.strftime("%H:%M:%S", time.gmtime(values["eta_seconds"]))
            print(f"step {step}/{self._num_steps}  {numbers}  ETA {eta}", file=sys.stderr)

    def say(self, text: str) -> None:
        """A line of text above the progress line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()
