"""Save, restore and list checkpoints."""

from clip_jax.checkpoint.store import CheckpointStore

__all__ = ["CheckpointStore"]
