"""Where a run begins: the one place that says what comes before what.

1. Its own latest checkpoint that is whole (resume).
2. The checkpoint of another run that `start.branch` names: all of it (branch).
3. Weights that `start.image` and `start.text` name, then those of `start.model` (initialise).
4. Weights drawn from the seed (scratch).
"""

import contextlib
import dataclasses
from typing import Any

import jax

from clip_jax.checkpoint import CheckpointStore, Workdir
from clip_jax.config import ExperimentConfig, UserError
from clip_jax.parallel import from_first_process
from clip_jax.tasks import Task
from clip_jax.training.quarantine import Range, listed
from clip_jax.training.start import NdArray, agreed_step, describe, starting_arrays, with_arrays
from clip_jax.training.state import TrainState, init_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What a run goes on from."""

    step: int = 0
    samples_seen: int = 0
    position: dict[str, Any] = dataclasses.field(default_factory=dict)  # of TrainingInput
    quarantine: tuple[Range, ...] = ()  # that it has passed over, or has to from here on
    losses: list[float] = dataclasses.field(default_factory=list)  # of SpikeDetector
    resumed: bool = False  # from a checkpoint of its own
    state: TrainState | None = None  # None: to be made, with `arrays` in it
    arrays: dict[str, NdArray] = dataclasses.field(default_factory=dict)
    said: str = ""  # for the user

    def make_state(
        self, task: Task, optimizer: Any, abstract: TrainState, *, seed: int
    ) -> TrainState:
        if self.state is not None:
            return self.state
        return with_arrays(init_state(task, optimizer, abstract, seed), self.arrays)


def find_origin(
    config: ExperimentConfig,
    workdir: Workdir,
    store: CheckpointStore | None,
    abstract: TrainState,
) -> Origin:
    """store: of the run's own checkpoints, None where it has none.

    Raises UserError where what is named is missing, damaged or does not fit.
    """
    if store is not None and from_first_process(store.has_any()):
        step, state, metadata = store.restore_latest(abstract)
        said = f"resuming {workdir.path} at step {step}"
        if step >= config.num_steps:
            said = f"{workdir.path} is done: {step} steps"
        return _from_checkpoint(step, state, metadata, resumed=True, said=said)
    if config.start.branch is not None:
        return _branch(config, abstract)
    arrays = starting_arrays(config, abstract)
    said = f"starting with {describe(config.start)}: {len(arrays)} arrays" if arrays else ""
    return Origin(arrays=arrays, said=said)


def _branch(config: ExperimentConfig, abstract: TrainState) -> Origin:
    folder = Workdir(str(config.start.branch))
    folder.load_config()
    with contextlib.closing(CheckpointStore(folder.checkpoints)) as store:
        step = agreed_step(store, config.start.step)
        state = store.restore(abstract, step)
        metadata = store.metadata(step)
    step = int(jax.device_get(state.step))
    if step >= config.num_steps:
        raise UserError(
            f"config.start.branch {folder.path} is at step {step} already; config.num_steps "
            f"{config.num_steps} must be more"
        )
    said = f"branching off {folder.path} at step {step}"
    origin = _from_checkpoint(step, state, metadata, resumed=False, said=said)
    # It may have gone back since it saved this one.
    return dataclasses.replace(origin, quarantine=(*origin.quarantine, *listed(folder)))


def _from_checkpoint(
    step: int, state: TrainState, metadata: dict[str, Any], *, resumed: bool, said: str
) -> Origin:
    return Origin(
        step=step,
        samples_seen=metadata["samples_seen"],
        position=metadata.get("data", {}),
        quarantine=tuple((first, end) for first, end in metadata.get("quarantine", ())),
        losses=metadata.get("losses", []),
        resumed=resumed,
        state=state,
        said=said,
    )
