"""A run on disk: its workdir and its checkpoints."""

from clip_jax.checkpoint.locks import Lock
from clip_jax.checkpoint.metrics_file import (
    BadSamplesFile,
    MetricsFile,
    drop_bad_samples_after,
    drop_metrics_after,
    read_metrics,
)
from clip_jax.checkpoint.paths import AnyPath, BucketPath, any_path, write_atomically
from clip_jax.checkpoint.quarantine import add_quarantine, read_quarantine
from clip_jax.checkpoint.store import SKIP, CheckpointStore, leaves_by_path, unflatten
from clip_jax.checkpoint.uploads import UploadedFolder
from clip_jax.checkpoint.workdir import Workdir

__all__ = [
    "SKIP",
    "AnyPath",
    "BadSamplesFile",
    "BucketPath",
    "CheckpointStore",
    "Lock",
    "MetricsFile",
    "UploadedFolder",
    "Workdir",
    "add_quarantine",
    "any_path",
    "drop_bad_samples_after",
    "drop_metrics_after",
    "leaves_by_path",
    "read_metrics",
    "read_quarantine",
    "unflatten",
    "write_atomically",
]
