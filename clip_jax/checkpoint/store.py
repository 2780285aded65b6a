"""Saving and restoring a run: the one module that knows Orbax."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from clip_jax.config import CheckpointConfig, UserError

SKIP = ocp.PLACEHOLDER
StateT = TypeVar("StateT", bound=Any)  # a NamedTuple of groups of arrays


class CheckpointStore:
    """The checkpoints of one run, numbered by step.

    Each holds the state's arrays and, as metadata, what is needed to use them without the
    workdir (config, tokenizer) and to go on (position in the data).
    """

    def __init__(self, directory: Path, config: CheckpointConfig | None = None) -> None:
        """Opens `directory`, which is made where there is none. No config: for reading only."""
        self._directory = Path(directory).absolute()
        self._config = config
        policies = ocp.training.preservation_policies
        preserve = policies.PreserveAll()
        if config is not None:
            keep = [policies.LatestN(config.keep_latest)]
            if config.keep_every_steps is not None:
                keep.append(policies.EveryNSteps(config.keep_every_steps))
            preserve = policies.AnyPreservationPolicy(keep)
        self._checkpointer = ocp.training.Checkpointer(
            self._directory, preservation_policy=preserve
        )

    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def steps(self) -> list[int]:
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Saves unless this step is saved already; in the background if so configured."""
        if self.latest_step() == step:
            return
        save = (
            self._checkpointer.save_checkpointables_async
            if self._config is not None and self._config.asynchronous
            else self._checkpointer.save_checkpointables
        )
        # force: whether to save was decided by the caller.
        save(step, {"state": state}, custom_metadata=metadata, force=True)

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """What was saved beside the arrays of `step` (default: the latest)."""
        step = self._existing(step)
        metadata = self._checkpointer.checkpointables_metadata(step).custom_metadata
        if not isinstance(metadata, dict):
            raise UserError(f"checkpoint {self._directory / str(step)} has lost its metadata")
        return metadata

    def restore(self, abstract: StateT, step: int | None = None) -> StateT:
        """The arrays of `step` (default: the latest) in the shapes and shardings of `abstract`.

        abstract: a NamedTuple, each field a group of arrays as saved. Groups whose leaves are all
        `SKIP` are not read, need not be there, and come back as they are. Raises UserError where
        there is no such checkpoint or it does not fit.
        """
        step = self._existing(step)
        groups = abstract._asdict()
        read = {name: group for name, group in groups.items() if not _is_skipped(group)}
        try:
            stored = self._stored(step)
            # Before anything is read: a load that fails half-way leaves tasks behind in Orbax.
            problem = _misfit(
                {name: stored[name] for name in stored if name not in groups or name in read}, read
            )
            if problem is None:
                return abstract._replace(**self._load(step, stored, read))
        except (ValueError, KeyError, TypeError, OSError) as error:
            problem = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        older = [other for other in self.steps() if other < step]
        remedy = f"; to go on from step {older[-1]}, delete it" if older else ""
        path = self._directory / str(step)
        raise UserError(f"checkpoint {path} cannot be restored: {problem}{remedy}")

    def load(self, names: Sequence[str], step: int | None = None) -> dict[str, Any]:
        """Groups of `step` (default: the latest) as nested dicts of NumPy arrays on the host.

        Whatever model they are of: shapes are those saved. Raises UserError where there is no such
        checkpoint, it is damaged or has no such group.
        """
        step = self._existing(step)
        path = self._directory / str(step)
        try:
            stored = self._stored(step)
            if missing := [name for name in names if name not in stored]:
                raise UserError(f"checkpoint {path} has no {missing[0]}")
            read = {
                name: jax.tree.map(lambda leaf: np.empty((), leaf.dtype), stored[name])
                for name in names
            }
            return self._load(step, stored, read)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, OSError) as error:
            problem = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise UserError(f"checkpoint {path} cannot be read: {problem}") from error

    def _load(self, step: int, stored: dict[str, Any], read: dict[str, Any]) -> dict[str, Any]:
        """The groups `read`; the others of those `stored` are passed over."""
        wanted = {
            name: read[name] if name in read else jax.tree.map(lambda _: SKIP, group)
            for name, group in stored.items()
        }
        # Checkpointer.load hides the cause of a failure behind a NoEntryError.
        loaded = ocp.load(self._directory / str(step), wanted, checkpointable_name="state")
        # What is not in the file has no arrays, or _misfit had named one.
        return {name: loaded.get(name, group) for name, group in read.items()}

    def _stored(self, step: int) -> dict[str, Any]:
        """Shapes and dtypes of the arrays of `step`, by group."""
        stored: dict[str, Any] = self._checkpointer.checkpointables_metadata(step).metadata["state"]
        return stored

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self._directory}")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self._directory}; there are {steps}")
        return step

    def wait(self) -> None:
        """Returns when every save under way is complete on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        self._checkpointer.close()


def _is_skipped(group: Any) -> bool:
    leaves = jax.tree.leaves(group)
    return bool(leaves) and all(leaf is SKIP for leaf in leaves)


def _misfit(stored: Any, wanted: Any) -> str | None:
    """The first array of `wanted` that `stored` lacks, has in another shape, or has too many."""
    have, want = leaves_by_path(stored), leaves_by_path(wanted)
    for path, leaf in want.items():
        if path not in have:
            return f"it has no {path}"
        if tuple(have[path].shape) != tuple(leaf.shape):
            return f"{path} has shape {tuple(have[path].shape)}, not {tuple(leaf.shape)}"
    surplus = [path for path in have if path not in want]
    return f"it has {surplus[0]}, which this model has not" if surplus else None


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, as 'params/image/blocks/mlp/up/kernel'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
