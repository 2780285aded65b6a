"""What a run trains: model and batch in, loss and metrics out."""

from clip_jax.tasks.contrastive import ContrastiveTask
from clip_jax.tasks.task import Task

__all__ = ["ContrastiveTask", "Task"]
