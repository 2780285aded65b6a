"""Where the numbers of a run go: metrics.jsonl, TensorBoard, Weights & Biases, a progress line."""

import hashlib
import importlib.util
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from clip_jax.checkpoint import MetricsFile, UploadedFolder, Workdir
from clip_jax.config import ExperimentConfig, UserError, to_dict

_WAIT_TO_EXPLAIN = 0.05  # share of the time


def check_logging(config: ExperimentConfig) -> None:
    """Raises UserError where the config asks for a package that is not installed."""
    if config.logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "config.logging.wandb_project is set but wandb is not installed: "
            "pip install 'clip-jax-training[wandb]'"
        )


def expand(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Plain numbers by name: a vector X of n, one for each layer, becomes X/0 to X/(n-1)."""
    return {
        "/".join([name, *map(str, index)]): float(number)
        for name, values in metrics.items()
        for index, number in np.ndenumerate(np.asarray(values))
    }


class MetricsWriter:
    """Writes each line of metrics to every place the config asks for."""

    def __init__(self, workdir: Workdir, config: ExperimentConfig, *, first_step: int) -> None:
        """first_step: the step the run starts from; TensorBoard hides what came after it."""
        logging = config.logging
        self._file = MetricsFile(workdir, first_step, logging.upload_seconds)
        self._tensorboard: Any = None
        self._tensorboard_folder: UploadedFolder | None = None
        self._wandb: Any = None
        if logging.tensorboard:
            from tensorboardX import SummaryWriter

            folder = UploadedFolder(workdir.tensorboard, logging.upload_seconds)
            self._tensorboard_folder = folder
            self._tensorboard = SummaryWriter(str(folder.path), purge_step=first_step + 1)
        if logging.wandb_project is not None:
            import wandb

            self._wandb = wandb.init(
                project=logging.wandb_project,
                name=workdir.path.name,
                # Resumes the run of this very folder, not one of the same name elsewhere.
                id=hashlib.sha256(str(workdir.path).encode()).hexdigest()[:16],
                resume="allow",
                dir=workdir.path if isinstance(workdir.path, Path) else None,
                config=to_dict(config),
                allow_val_change=True,  # what a resume may change
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """values: plain numbers by name. A number that is not finite is written as null."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write({"step": step, **finite})
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def flush(self) -> None:
        """Uploads what a bucket has not got yet; call it at checkpoints."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None and self._tensorboard_folder is not None:
            self._tensorboard.close()
            self._tensorboard_folder.close()
        if self._wandb is not None:
            self._wandb.finish()


class ProgressLine:
    """One live line on a terminal; elsewhere a plain line now and then."""

    _SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, *, num_steps: int, first_step: int = 0, silent: bool = False) -> None:
        """silent: for all processes of a run but the first."""
        self._console = Console(file=sys.stderr, quiet=silent)
        self._silent = silent
        self._num_steps = num_steps
        self._last_line = -math.inf
        self._progress = Progress(
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=silent or not self._console.is_terminal,
        )
        self._bar = self._progress.add_task(
            "train", total=num_steps, completed=first_step, numbers="compiling"
        )
        self._progress.start()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """values: a line of metrics.jsonl and `eta_seconds`; what it lacks is left out.

        Where waiting for data shows, the stage with the most of it is named: `data_wait/STAGE`.
        """
        numbers = "  ".join([*_numbers(values), f"ETA {_duration(values['eta_seconds'])}"])
        self._progress.update(self._bar, completed=step, numbers=numbers)
        now = time.monotonic()
        plain = not self._console.is_terminal and not self._silent
        due = now - self._last_line > self._SECONDS_BETWEEN_LINES or step == self._num_steps
        if plain and due:
            self._last_line = now
            print(f"step {step}/{self._num_steps}  {numbers}", file=sys.stderr)

    def say(self, text: str) -> None:
        """A line of text above the progress line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def _numbers(values: Mapping[str, float]) -> list[str]:
    """What the progress line shows of a line of metrics."""
    rate = values["samples_per_second"]
    per_chip = values.get("samples_per_second_per_chip", rate)
    chips = f" ({_compact(per_chip)}/chip)" if per_chip < rate else ""
    shown = [f"loss {values['loss']:.4f}", f"{_compact(rate)} samples/s{chips}"]
    mfu = values.get("mfu", values.get("mfu_measured"))
    if mfu is not None:
        shown.append(f"MFU {mfu:.0%}")
    stages = {
        key.removeprefix("data_wait/"): share
        for key, share in values.items()
        if key.startswith("data_wait/")
    }
    why = ""
    if stages and values["data_wait"] > _WAIT_TO_EXPLAIN:
        why = f" ({max(stages, key=stages.__getitem__)})"
    shown.append(f"data wait {values['data_wait']:.0%}{why}")
    if values.get("restarts", 0) > 0 and "goodput" in values:
        shown.append(f"goodput {values['goodput']:.0%}")
    return shown


def _compact(rate: float) -> str:
    """Five digits at most: a slow run shows its fractions."""
    if rate >= 100_000:
        return f"{rate / 1000:,.0f}k"
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _duration(seconds: float) -> str:
    days, rest = divmod(round(min(seconds, 999 * 86_400)), 86_400)
    clock = time.strftime("%H:%M:%S", time.gmtime(rest))
    return f"{days}d {clock[:2]}h" if days else clock
