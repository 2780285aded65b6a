"""A run on disk: its workdir and its checkpoints."""

from clip_jax.checkpoint.store import SKIP, CheckpointStore, leaves_by_path
from clip_jax.checkpoint.workdir import (
    Workdir,
    drop_bad_samples_after,
    drop_metrics_after,
    read_metrics,
    write_atomically,
)

__all__ = [
    "SKIP",
    "CheckpointStore",
    "Workdir",
    "drop_bad_samples_after",
    "drop_metrics_after",
    "leaves_by_path",
    "read_metrics",
    "write_atomically",
]
