"""The folder of a run: its config, tokenizer, metrics, checkpoints and report."""

import secrets
import tempfile

from clip_jax.checkpoint.locks import Lock, lock
from clip_jax.checkpoint.paths import AnyPath, BucketPath, any_path, write_atomically
from clip_jax.config import ExperimentConfig, UserError, load_json, parse_json, to_json

# Where Orbax 0.12 writes checkpoints, tried: s3:// ends in "Checkpoint path should be absolute".
_CHECKPOINT_SCHEMES = ("gs",)


class Workdir:
    """Paths inside one run's folder: on a local disk, or in a bucket (`gs://bucket/run`)."""

    def __init__(self, path: AnyPath | str) -> None:
        self.path = any_path(path)
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.metrics = self.path / "metrics.jsonl"
        self.quarantine = self.path / "quarantine.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report.html"

    def bad_samples(self, process_index: int = 0) -> AnyPath:
        """Where a process writes down the samples that it could not use."""
        part = f".{process_index}" if process_index else ""
        return self.path / f"bad_samples{part}.jsonl"

    def exists(self) -> bool:
        return self.config.exists()

    def load_config(self) -> ExperimentConfig:
        """The config of the run. Raises UserError where the folder holds none, or a broken one."""
        if not self.exists():
            raise UserError(f"{self.path} is not the workdir of a run: it has no config.json")
        if isinstance(self.config, BucketPath):
            return parse_json(self.config.read_bytes(), str(self.config))
        return load_json(self.config)

    def check_writable(self) -> None:
        """Makes the folder. Raises UserError where a run cannot write all of its files there."""
        if isinstance(self.path, BucketPath):
            scheme = str(self.path).partition("://")[0]
            if scheme not in _CHECKPOINT_SCHEMES:
                raise UserError(
                    f"workdir {self.path}: checkpoints are written to local folders and to gs:// "
                    f"alone; mount the {scheme}:// store as a folder that can rename, or use gs://"
                )
            probe = self.path / f"probe-{secrets.token_hex(8)}"
            probe.write_text("")
            probe.unlink()
            return
        if self.path.is_file():
            raise UserError(f"workdir {self.path} is a file; name a folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise UserError(f"workdir {self.path} cannot be written: {error.strerror}") from None

    def lock(self) -> Lock:
        """Keeps other processes from training here until it is closed.

        Raises UserError where one does already; in a bucket that may take a minute to tell.
        """
        return lock(self.path)

    def save_config(self, config: ExperimentConfig) -> None:
        write_atomically(self.config, to_json(config))
