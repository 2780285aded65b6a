"""Saving and restoring a run. Orbax is known in this room alone: it writes, here."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from clip_jax.checkpoint.checksums import SavedArray, ShardChecksums
from clip_jax.checkpoint.failures import FAILURES, is_full, is_refused
from clip_jax.checkpoint.paths import AnyPath, BucketPath, any_path
from clip_jax.checkpoint.reading import ArrayReader
from clip_jax.checkpoint.record import (
    DamagedError,
    file_problems,
    one_line,
    read_metadata,
    read_record,
)
from clip_jax.checkpoint.retention import (
    drop_scores_after,
    read_scores,
    reasons_to_keep,
    write_score,
)
from clip_jax.checkpoint.shelf import Shelf
from clip_jax.config import CheckpointConfig, TemporaryError, UserError
from clip_jax.parallel import from_first_process, on_all_processes, values_of_processes

SKIP = ocp.PLACEHOLDER
StateT = TypeVar("StateT", bound=Any)  # a NamedTuple of groups of arrays

_log = logging.getLogger(__name__)

# Below it every replica would write a sliver of each small array: a compiled slice and an object.
_SMALLEST_SLICE = 2**20


class CheckpointStore:
    """The checkpoints of one run, numbered by step.

    Each holds the state's arrays and, as metadata, what is needed to use them without the
    workdir (config, tokenizer) and to go on (position in the data). docs/checkpoints.md says what
    is kept and what happens in each fault. All processes must call `save`, `wait`, `restore` and
    `restore_latest`, in the same order.
    """

    def __init__(self, directory: AnyPath | str, config: CheckpointConfig | None = None) -> None:
        """Opens `directory`, which is made where there is none.

        config: of the run that saves here; what an earlier call of it left half done is removed.
        None: for reading, beside a run that saves, or for saving once.
        """
        self._directory = any_path(directory)
        self._config = config
        self._shelf = Shelf(self._directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        if config is not None and jax.process_index() == 0:
            self._shelf.clean()

    # ---- What is there ---------------------------------------------------------------------------

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Of complete checkpoints, ascending; those found damaged are no more among them."""
        return self._shelf.steps()

    def has_any(self) -> bool:
        """Whether there are checkpoints, damaged ones included: all that `restore_latest` tries."""
        return bool(self._shelf.numbered())

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """What was saved beside the arrays of `step` (default: the latest)."""
        path = self._shelf.path(self._existing(step))
        with _named(path, "read"):
            return read_metadata(path, read_record(path))

    # ---- Saving ----------------------------------------------------------------------------------

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Saves unless this step is saved already; in the background if so configured.

        Returns when the arrays may change. Raises UserError where this save, or the one before,
        failed: the checkpoints before it are as they were, and a later call may succeed.
        """
        self.wait()
        if from_first_process(step in self.steps()):
            return
        groups = list(state._asdict() if hasattr(state, "_asdict") else state)
        items = {"state": state, "checksums": ShardChecksums(leaves_by_path(state))}
        with self._failures(step), _saving_context(self._directory):
            response = ocp.save_checkpointables_async(
                str(self._shelf.being_saved(step)), items, custom_metadata=metadata
            )
        self._pending = (step, self._worker.submit(self._finish, step, response, groups))
        if self._config is None or not self._config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when every save under way is complete on disk. Raises UserError if it failed."""
        pending, self._pending = self._pending, None

        def settle() -> None:
            if pending is not None:
                with self._failures(pending[0]):
                    pending[1].result()

        on_all_processes(settle)

    def check(self) -> None:
        """Raises UserError where the save under way has failed in this process. No collective.

        The others may be waiting for it in the save: who ends at once ends them too.
        """
        if self._pending is not None and self._pending[1].done():
            with self._failures(self._pending[0]):
                self._pending[1].result()

    def drop_scores_after(self, step: int) -> None:
        """Forgets scores of later steps: they are trained, and scored, again."""
        if jax.process_index() == 0:
            drop_scores_after(self._directory, step)

    def close(self) -> None:
        """Ends a save under way; an error of it is logged, since another may be on its way up."""
        if self._pending is not None:
            step, future = self._pending
            self._pending = None
            if (error := future.exception()) is not None:
                _log.warning("%s", self._described(step, error))
        self._worker.shutdown()

    def note_score(self, step: int, value: float) -> None:
        """Tells the value by which `keep_best` goes: the highest stay."""
        if jax.process_index() == 0:
            write_score(self._directory, step, value)

    def delete(self, step: int) -> None:
        """Removes a checkpoint, damaged or not, for good."""
        if jax.process_index() == 0:
            self._shelf.delete(step)

    def _finish(self, step: int, response: Any, groups: list[str]) -> None:
        """In the background: completes what Orbax saves, and removes what need not stay."""
        is_first = jax.process_index() == 0
        try:
            response.result()
            if is_first:
                self._shelf.complete(step, num_processes=jax.process_count(), groups=groups)
        except BaseException:
            if is_first:
                with contextlib.suppress(OSError, UserError):  # the first error is the one to tell
                    self._shelf.clean()  # a full disk needs the room
            raise
        if is_first and self._config is not None:
            try:
                self._prune(self._config)
            except (OSError, UserError) as error:  # it is saved all the same
                _log.warning("old checkpoints in %s stay: %s", self._directory, one_line(error))

    def _prune(self, config: CheckpointConfig) -> None:
        steps = self.steps()
        keep = reasons_to_keep(steps, read_scores(self._directory), config)
        for old in steps:
            if old not in keep:
                self._shelf.delete(old)

    # ---- Restoring -------------------------------------------------------------------------------

    def restore(self, abstract: StateT, step: int | None = None) -> StateT:
        """The arrays of `step` (default: the latest) in the shapes and shardings of `abstract`.

        abstract: a NamedTuple, each field a group of arrays as saved. Groups whose leaves are all
        `SKIP` are not read, need not be there, and come back as they are. Raises UserError where
        there is no such checkpoint, it is damaged or does not fit.
        """
        step = from_first_process(self._existing(step))
        older = [other for other in self.steps() if other < step]
        remedy = f"; the one before is step {older[-1]}" if older else ""

        def work() -> StateT:
            with _named(self._shelf.path(step), "restored", remedy):
                return self._read(step, abstract)[0]

        return on_all_processes(work)

    def restore_latest(self, abstract: StateT) -> tuple[int, StateT, dict[str, Any]]:
        """Step, state and metadata of the newest checkpoint that is whole, for all processes.

        A damaged one is named in a warning and moved aside, and the one before it is used. Raises
        UserError where none is whole (then all stay where they are) or one does not fit.
        """
        damaged: list[tuple[int, str]] = []
        while True:
            tried = min((step for step, _ in damaged), default=2**31 - 1)
            below = [step for step in self._shelf.numbered() if step < tried]
            step = from_first_process(max(below, default=-1))
            if step < 0:
                break
            found, problem = self._try(step, abstract)
            if found is not None:
                for bad, why in damaged:
                    self._set_aside(bad, why, step)
                # No process goes on to save in a folder that is still being moved.
                from_first_process(0)
                return step, *found
            damaged.append((step, problem))
        if not damaged:
            raise UserError(f"no checkpoint in {self._directory}")
        named = "; ".join(f"{step}: {problem}" for step, problem in damaged)
        raise UserError(
            f"no checkpoint in {self._directory} is whole: {named}; bring back a copy, or train in "
            "another --workdir"
        )

    def _try(self, step: int, abstract: StateT) -> tuple[tuple[StateT, dict[str, Any]] | None, str]:
        """What `step` holds, or None on all processes and what is wrong with it."""
        found, problem = None, ""

        def attempt() -> None:
            nonlocal found, problem
            # An error of another kind ends the run: it is whole, but does not fit.
            with _named(self._shelf.path(step), "restored"):
                try:
                    found = self._read(step, abstract)
                except DamagedError as error:
                    problem = str(error)

        on_all_processes(attempt)
        failed = [i for i, bad in enumerate(values_of_processes(int(bool(problem)))) if bad]
        if not failed:
            return found, ""
        if problem and jax.process_index() != 0:
            _log.warning("process %d: %s", jax.process_index(), problem)
        return None, problem or f"process {failed[0]} cannot read it and says why"

    def _read(self, step: int, abstract: StateT) -> tuple[StateT, dict[str, Any]]:
        """Raises DamagedError where it is not what was saved, other UserErrors if unfit."""
        path, verify = self._shelf.path(step), self._config is None or self._config.verify
        record = read_record(path)
        metadata = read_metadata(path, record)
        if verify and jax.process_index() == 0 and (problems := file_problems(path, record)):
            raise DamagedError(problems[0])
        groups = abstract._asdict()
        read = {name: group for name, group in groups.items() if not _is_skipped(group)}
        passed_over = [name for name in groups if name not in read]
        stored = {
            name: array
            for name, array in record.arrays.items()
            if name.split("/")[0] not in passed_over
        }
        if (problem := _misfit(stored, leaves_by_path(read))) is not None:
            raise UserError(problem)
        reader = ArrayReader(path, record, verify=verify)
        placed = reader.place_all(leaves_by_path(read))
        leaves, structure = jax.tree.flatten(read)
        assert len(leaves) == len(placed)
        arrays = [placed[name] for name in leaves_by_path(read)]
        return abstract._replace(**jax.tree.unflatten(structure, arrays)), metadata

    def load(self, names: Sequence[str], step: int | None = None) -> dict[str, Any]:
        """Groups of `step` (default: the latest) as nested dicts of NumPy arrays on the host.

        Whatever model they are of: shapes are those saved. Raises UserError where there is no such
        checkpoint, it is damaged or has no such group.
        """
        path = self._shelf.path(self._existing(step))
        with _named(path, "read"):
            record = read_record(path)
        if missing := [name for name in names if name not in record.groups]:
            raise UserError(f"checkpoint {path} has no {missing[0]}")
        wanted = [name for name in record.arrays if name.split("/")[0] in names]
        with _named(path, "read"):
            arrays = ArrayReader(path, record).read_all(wanted)
        return {name: {} for name in names} | unflatten(arrays)

    def verify(self, step: int) -> list[str]:
        """What is wrong with a checkpoint, in words; [] where it is what was saved."""
        return self._shelf.verify(step)

    # ---- Helpers ---------------------------------------------------------------------------------

    def _set_aside(self, step: int, problem: str, used: int) -> None:
        if jax.process_index() == 0:
            aside = self._shelf.set_aside(step)
            _log.warning(
                "checkpoint %s is damaged: %s; it is now %s, and step %d is used",
                self._shelf.path(step),
                problem,
                aside.name,
                used,
            )

    def _existing(self, step: int | None) -> int:
        if step is not None and step in self._shelf.numbered():
            return step  # what it may lack is told where it is read
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self._directory}")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self._directory}; there are {steps}")
        return step

    @contextlib.contextmanager
    def _failures(self, step: int) -> Iterator[None]:
        """What goes wrong in saving `step` as one line for the user."""
        try:
            yield
        except FAILURES as error:
            kind = UserError if is_full(error) or is_refused(error) else TemporaryError
            raise kind(self._described(step, error)) from error

    def _described(self, step: int, error: BaseException) -> str:
        kept = self.latest_step()
        before = f"step {kept} is as it was" if kept is not None else "there is none before it"
        if is_full(error):
            return (
                f"checkpoint of step {step} is not saved: no space left in {self._directory}; "
                f"{before}; free some, then resume"
            )
        reason = one_line(error)
        return f"checkpoint of step {step} is not saved in {self._directory}: {reason}; {before}"


@contextlib.contextmanager
def _named(path: AnyPath, verb: str, remedy: str = "") -> Iterator[None]:
    """Names the checkpoint in an error about it."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"checkpoint {path} cannot be {verb}: {error}{remedy}") from None


def _saving_context(directory: AnyPath) -> ocp.Context:
    context = ocp.Context()
    saving = context.array_options.saving
    # What ArrayReader reads. OCDBT: a process writes a few large files, however many arrays; in a
    # bucket each file costs 50 ms.
    saving.use_ocdbt, saving.use_zarr3 = True, True
    # Trained weights shrink by a tenth, and that takes longer than to write them: 0.4 GB on two
    # cores 5.4 s instead of 2.1 s, while the cores are there to decode images.
    saving.use_compression = False
    # Replicas on several hosts share the work. On one host their slices would only be copies.
    saving.use_replica_parallel = jax.process_count() > 1
    saving.min_slice_bytes_for_replica_parallel = _SMALLEST_SLICE
    saving.array_metadata_store = None  # one file less for each process: nothing reads it
    if isinstance(directory, BucketPath):  # Orbax knows this of gs:// alone
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    return context


def _is_skipped(group: Any) -> bool:
    leaves = jax.tree.leaves(group)
    return bool(leaves) and all(leaf is SKIP for leaf in leaves)


def _misfit(stored: dict[str, SavedArray], wanted: dict[str, Any]) -> str | None:
    """The first array of `wanted` that `stored` lacks, has in another shape, or has too many."""
    # Parameters first: what an optimizer keeps of them says less to a reader.
    for name in sorted(wanted, key=lambda name: not name.startswith("params/")):
        leaf = wanted[name]
        if name not in stored and name.startswith("ema/"):
            return "it keeps no moving average of the weights (config.optimizer.ema_decay)"
        if name not in stored:
            return f"it has no {name}"
        if stored[name].shape != tuple(leaf.shape):
            return f"{name} has shape {stored[name].shape}, not {tuple(leaf.shape)}"
    surplus = [name for name in stored if name not in wanted]
    return f"it has {surplus[0]}, which this model has not" if surplus else None


def unflatten(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Dicts in dicts of arrays by path; what was a list or tuple is a dict by place."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = array
    return tree


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, as 'params/image/blocks/mlp/up/kernel'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
