"""The folder of a run: its config, tokenizer, metrics, checkpoints and report."""

import contextlib
import fcntl
import json
import os
import tempfile
from pathlib import Path
from typing import IO, Any

from clip_jax.config import ExperimentConfig, UserError, load_json, to_json


class Workdir:
    """Paths inside one run's folder."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report.html"

    def bad_samples(self, process_index: int = 0) -> Path:
        """Where a process writes down the samples that it could not use."""
        part = f".{process_index}" if process_index else ""
        return self.path / f"bad_samples{part}.jsonl"

    def exists(self) -> bool:
        return self.config.exists()

    def load_config(self) -> ExperimentConfig:
        """The config of the run. Raises UserError where the folder holds none, or a broken one."""
        if not self.exists():
            raise UserError(f"{self.path} is not the workdir of a run: it has no config.json")
        return load_json(self.config)

    def lock(self) -> IO[str]:
        """Keeps other processes from training here until the file is closed.

        Raises UserError where one does already.
        """
        file = (self.path / ".lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"another process trains in {self.path}; wait for it or use another --workdir"
            ) from None
        return file

    def save_config(self, config: ExperimentConfig) -> None:
        write_atomically(self.config, to_json(config))


def write_atomically(path: Path, text: str) -> None:
    """The whole text or the old file: never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a crash is left out.

    Raises UserError where another line is no metrics line: nothing is thrown away unseen.
    """
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        elif number < len(texts):
            raise UserError(
                f"{path} line {number} is not a metrics line: {text[:60]!r}; mend or remove it"
            )
    return lines


def drop_bad_samples_after(path: Path, position: int) -> None:
    """Keeps what a process found bad before `position` in the order.

    What follows is read again by the resumed run. A line cut short by a crash is left out.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["position"] < position:
                kept.append(line + "\n")
    write_atomically(path, "".join(kept))


def drop_metrics_after(path: Path, step: int) -> None:
    """Keeps the lines up to `step`: what follows is computed again by the resumed run."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if text != path.read_text(encoding="utf-8", errors="replace"):
        write_atomically(path, text)
