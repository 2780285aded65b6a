"""The folder of a run: its config, tokenizer, metrics, checkpoints and report."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

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

    def exists(self) -> bool:
        return self.config.exists()

    def load_config(self) -> ExperimentConfig:
        """The config of the run. Raises UserError where the folder holds none."""
        if not self.exists():
            raise UserError(f"{self.path} is not the workdir of a run: it has no config.json")
        return load_json(self.config)

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
    """The lines of a metrics.jsonl; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def drop_metrics_after(path: Path, step: int) -> None:
    """Keeps the lines up to `step`: what follows is computed again by the resumed run."""
    lines = read_metrics(path)
    kept = [line for line in lines if line["step"] <= step]
    if path.exists():
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
