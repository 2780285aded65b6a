"""Checks of what a run writes and starts from: state, workdir, checkpoints, room, memory."""

import contextlib
import dataclasses
import functools
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from clip_jax.checkpoint import BucketPath, Workdir, leaves_by_path
from clip_jax.checkpoint.folders import file_sizes
from clip_jax.checkpoint.locks import BucketLock
from clip_jax.checkpoint.record import Record, read_record
from clip_jax.checkpoint.shelf import Shelf
from clip_jax.config import ConfigError, UserError, check_devices, check_frozen
from clip_jax.data.streams import WINDOW_BYTES
from clip_jax.models import Execution
from clip_jax.parallel import MESH_AXES
from clip_jax.parallel.chips import chip_of
from clip_jax.planning.doctor_case import (
    Case,
    Checks,
    Finding,
    Level,
    counted,
    nearest_existing,
    refusals,
    size,
)
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.measured import keep_measured
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.resume import check_workdir
from clip_jax.training.state import TrainState, abstract_state, count_parameters

_READ_AHEAD = 4 * 2**20  # bytes held of each tar of a stream; `data.sources.files` has two blocks
_MOST_MEMORY = 0.8  # of what the host has; the rest is other processes' and the checkpoint's
# Their first axis follows the resolution or context length: `training.start` resamples them.
_RESAMPLED = (
    "text/position_embedding",
    "image/position_embedding",
    "image/pooling/position_embedding",
)


def run_checks(case: Case) -> Checks:
    checks = RunChecks(case)
    return {
        "state": checks.state,
        "workdir": checks.workdir,
        "lock": checks.lock,
        "checkpoints": checks.checkpoints,
        "start": checks.start,
        "room": checks.room,
        "memory": checks.memory,
    }


class RunChecks:
    """Nothing is allocated on a device, read from a checkpoint's arrays, or written to stay."""

    def __init__(self, case: Case) -> None:
        self._case, self._config, self._workdir = case, case.config, case.workdir
        if self._workdir is not None:
            self._config = _measured(case.config, self._workdir)
        self._workdir_is_usable = True  # until its own check tells that it is not
        self._mesh = _mesh(case)
        self._task = ContrastiveTask(
            self._config,
            self._mesh,
            execution=Execution.for_backend("cpu", precision=self._config.precision),
        )
        config = self._config
        self._abstract: TrainState = abstract_state(
            self._task,
            make_optimizer(config, self._task.trainable),
            self._mesh,
            ema=config.optimizer.ema_decay is not None,
        )
        self._num_bytes = sum(map(_bytes_of, jax.tree.leaves(self._abstract)))

    def state(self) -> Iterator[Finding]:
        """Its size against a device: the least that training needs."""
        check_frozen(self._config, leaves_by_path(self._abstract.params))
        local = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(self._abstract)
        )
        count = count_parameters(self._abstract.params)
        text = f"{count:,} parameters; with the optimizer {size(self._num_bytes)}, {size(local)} on"
        count = self._mesh.size
        text += " the device" if count == 1 else f" each of {count:,} devices"
        chip = None
        if not self._case.elsewhere:
            with contextlib.suppress(TimeoutError, UserError):  # the check of devices tells those
                chip = chip_of(self._case.machine.devices())
        if chip is not None and local > chip.memory_bytes / chip.num_devices:
            remedy = "split it with a larger fsdp axis, as in --config.mesh='(-1, 8, 1)'"
            has = size(chip.memory_bytes / chip.num_devices)
            yield Finding("error", "state", f"{text}, which has {has} ({chip.name}); {remedy}")
        elif self._case.elsewhere:
            asked = "`clip-jax plan --topology=...` tells whether a step fits there"
            yield Finding("ok", "state", f"{text}, of an unknown kind; {asked}")
        else:
            yield Finding("ok", "state", text)

    def workdir(self) -> Iterator[Finding]:
        """Whether a run may start, or go on, there."""
        workdir = self._workdir
        if workdir is None:
            yield Finding("ok", "workdir", "not given: --workdir=FOLDER checks it too")
            return
        path = workdir.path
        if isinstance(path, Path) and not path.exists():
            # What a run would make there is not made; a file in the way is found as one.
            self._check_writable(Workdir(nearest_existing(path)))
            yield Finding("ok", "workdir", f"{path} can be made")
            return
        self._check_writable(workdir)
        changes = check_workdir(workdir, self._config, allow_config_change=False)
        if not workdir.exists():
            yield Finding("ok", "workdir", f"{path} can be written; no run is in it")
            return
        changed = f", {len(changes)} fields that may change do: {', '.join(changes)}"
        text = f"{path} can be written; its run goes on{changed if changes else ''}"
        yield Finding("ok", "workdir", text)

    def _check_writable(self, workdir: Workdir) -> None:
        """What would be looked at in the workdir is left out where it cannot be: one line is."""
        try:
            workdir.check_writable()
        except UserError:
            self._workdir_is_usable = False
            raise

    def lock(self) -> Iterator[Finding]:
        """Whether another run trains there."""
        if self._workdir is None or not self._workdir_is_usable:
            return
        path = self._workdir.path
        if isinstance(path, BucketPath):
            if any((path / "lock").iterdir()):
                BucketLock(path, wait=_refuse_to_wait).close()
        elif (path / ".lock").exists():
            self._workdir.lock().close()
        yield Finding("ok", "lock", "no other run trains there")

    def checkpoints(self) -> Iterator[Finding]:
        """The newest that is whole, and whether the run can go on from it."""
        if self._workdir is None or not self._workdir_is_usable:
            return
        shelf = Shelf(self._workdir.checkpoints)
        numbered = shelf.numbered()
        damaged: list[str] = []
        step = None
        for number in reversed(numbered):
            problem = shelf.quick_problem(number)
            if problem is None:
                step = number
                break
            damaged.append(f"{number} ({problem})")
        if damaged:
            goes_on = f"the run goes on from step {step}"
            if step is None:
                goes_on = "none is whole, so a run stops: bring back a copy, or use another workdir"
            text = f"damaged: step {', '.join(damaged)}; {goes_on}; `clip-jax checkpoints verify` "
            level: Level = "warning" if step is not None else "error"
            yield Finding(level, "checkpoints", f"{text}says what is wrong")
        if step is None:
            if not damaged:
                yield Finding("ok", "checkpoints", "none yet")
            return
        record = read_record(shelf.path(step))
        if problem := _misfit(_shapes(record), _wanted(self._abstract)):
            text = f"step {step} does not fit this config: {problem}; give the run's own model and"
            text += " optimizer (`--config=WORKDIR/config.json`), or another --workdir"
            yield Finding("error", "checkpoints", text)
        elif step >= self._config.num_steps:
            text = f"step {step} of {self._config.num_steps} is there: the run is done; raise"
            yield Finding("ok", "checkpoints", f"{text} --config.num_steps in another --workdir")
        else:
            text = f"step {step}, the newest whole one of {len(numbered)}, fits"
            yield Finding("ok", "checkpoints", f"{text}: {size(record.num_bytes)}")

    def start(self) -> Iterator[Finding]:
        """The checkpoints that `config.start` names."""
        start = self._config.start
        found: list[Finding] = []
        if start.branch is not None:
            found += refusals("start", self._check_branch)
        for part in ("model", "image", "text"):
            if (folder := getattr(start, part)) is not None:
                found += refusals("start", functools.partial(self._check_weights, part, folder))
        named = {part: getattr(start, part) for part in ("branch", "model", "image", "text")}
        told = ", ".join(f"{part} {folder} fits" for part, folder in named.items() if folder)
        yield from found or [Finding("ok", "start", told or "weights are drawn from the seed")]

    def room(self) -> Iterator[Finding]:
        """For all the checkpoints that are to be kept, and the one that is being saved."""
        if not self._workdir_is_usable:
            return
        number = self._most_kept()
        needed = number * self._num_bytes
        text = f"at most {number:,} checkpoints of {size(self._num_bytes)}: {size(needed)}"
        if self._workdir is None or isinstance(self._workdir.path, BucketPath):
            yield Finding("ok", "room", text)
            return
        there = sum(file_sizes(self._workdir.checkpoints).values())
        free = shutil.disk_usage(nearest_existing(self._workdir.path)).free
        text += f" in {self._workdir.path}, where {size(free)} are free"
        if there:
            text += f" and {size(there)} are in checkpoints"
        if needed > free + there:
            remedy = "free some, raise checkpoint.keep_every_steps or lower keep_latest, keep_best"
            yield Finding("error", "room", f"{text}; {remedy}")
        else:
            yield Finding("ok", "room", text)

    def memory(self) -> Iterator[Finding]:
        """Of a host: batches read ahead, blocks of streams, the copy of a state being saved."""
        config, hosts = self._config, self._case.num_hosts
        data = config.data
        batch = sum(map(_bytes_of, _task_with_rows(self._task).batch_spec().values())) // hosts
        ahead = max(data.num_workers, 1) * (data.prefetch_batches + 2)
        parts = {f"{ahead} batches": ahead * batch}
        if data.streams:
            mine = math.ceil(data.stream.num_streams / hosts)
            tars = mine * data.stream.interleave * len(data.sources)
            parts[counted(mine, "stream")] = mine * WINDOW_BYTES + tars * _READ_AHEAD
        if config.checkpoint.asynchronous:
            parts["a checkpoint being saved"] = self._num_bytes // hosts
        needed, has = sum(parts.values()), self._case.machine.memory_bytes
        told = ", ".join(f"{what} {size(number)}" for what, number in parts.items())
        where = "" if hosts == 1 else f" on each of {hosts:,} hosts"
        text = f"{size(needed)}{where} ({told})"
        if has is None or self._case.elsewhere:
            yield Finding("ok", "memory", text)
        elif needed > _MOST_MEMORY * has:
            remedy = "lower data.prefetch_batches, num_workers or stream.num_streams"
            level: Level = "error" if needed > has else "warning"
            yield Finding(level, "memory", f"{text}, where {size(has)} are free; {remedy}")
        else:
            yield Finding("ok", "memory", f"{text}, where {size(has)} are free")

    # ---- Helpers ---------------------------------------------------------------------------------

    def _most_kept(self) -> int:
        checkpoint = self._config.checkpoint
        saves = math.ceil(self._config.num_steps / checkpoint.every_steps)
        kept = max(1, checkpoint.keep_latest) + checkpoint.keep_best
        if checkpoint.keep_every_steps is not None:
            both = math.lcm(checkpoint.keep_every_steps, checkpoint.every_steps)
            kept += self._config.num_steps // both
        return min(saves, kept + 1)

    def _check_branch(self) -> None:
        start = self._config.start
        step, record = _record("branch", str(start.branch), start.step)
        if step >= self._config.num_steps:
            raise ConfigError(
                f"config.start.branch {start.branch} is at step {step} already; config.num_steps "
                f"{self._config.num_steps} must be more"
            )
        if problem := _misfit(_shapes(record), _wanted(self._abstract)):
            raise ConfigError(f"config.start.branch {start.branch} does not fit: {problem}")

    def _check_weights(self, part: str, folder: str) -> None:
        start = self._config.start
        _, record = _record(part, folder, start.step)
        group = "ema" if start.use_ema else "params"
        prefix = "" if part == "model" else f"{part}/"
        stored = {
            name.split("/", 1)[1]: shape
            for name, shape in _shapes(record).items()
            if name.startswith((f"{group}/{prefix}", f"model_state/{prefix}"))
        }
        if start.use_ema and "ema" not in {name.split("/")[0] for name in record.arrays}:
            raise UserError(
                f"config.start.{part} {folder} has no moving average of its weights; use "
                "config.start.use_ema=False"
            )
        wanted = {
            name.split("/", 1)[1]: shape
            for name, shape in _wanted(self._abstract).items()
            if name.startswith((f"params/{prefix}", f"model_state/{prefix}"))
        }
        for shapes in (stored, wanted):
            for name in _RESAMPLED:
                if name in shapes:
                    shapes[name] = shapes[name][1:]
        if problem := _misfit(stored, wanted):
            raise UserError(
                f"config.start.{part} {folder} does not fit config.model: {problem}; take "
                "config.model from it (start.weights_only=False) or name other weights"
            )


def _measured(config: Any, workdir: Workdir) -> Any:
    """What the run has measured before; a workdir that cannot be read is told by its own check."""
    try:
        return keep_measured(config, workdir)
    except (UserError, OSError):
        return config


def _mesh(case: Case) -> Any:  # AbstractMesh: it has shapes and names, and no devices
    try:
        sizes = check_devices(case.config, case.count_devices())
    except (TimeoutError, UserError):  # told by the check of the mesh
        sizes = (1, 1, 1)
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _task_with_rows(task: ContrastiveTask) -> ContrastiveTask:
    """With the most rows that a group of packed captions may have, where they are not given."""
    packing = task.config.data.packing
    if not packing.group_size or packing.rows is not None:
        return task
    packing = dataclasses.replace(packing, rows=packing.group_size)
    data = dataclasses.replace(task.config.data, packing=packing)
    config = dataclasses.replace(task.config, data=data)
    return ContrastiveTask(config, task.mesh, execution=task.execution)


def _bytes_of(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _refuse_to_wait(seconds: float) -> None:
    raise UserError(
        "another process held the lock of the workdir less than a minute ago, and may still train "
        "there; stop it, or try again in a minute if it has ended"
    )


def _record(part: str, folder: str, step: int | None) -> tuple[int, Record]:
    """Which checkpoint a run would start from, and what it consists of."""
    workdir = Workdir(folder)
    try:
        workdir.load_config()
        shelf = Shelf(workdir.checkpoints)
        there = shelf.steps()
        if not there or (step is not None and step not in there):
            raise UserError(f"no checkpoint {f'of step {step} ' if step else ''}is there: {there}")
        step = there[-1] if step is None else step
        if problem := shelf.quick_problem(step):
            raise UserError(f"the checkpoint of step {step} is damaged: {problem}")
        return step, read_record(shelf.path(step))
    except UserError as error:
        raise UserError(
            f"config.start.{part} {folder}: {error}; name the workdir of a run or of clip-jax "
            "import that has one"
        ) from None


def _shapes(record: Record) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in record.arrays.items()}


def _wanted(abstract: TrainState) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in leaves_by_path(abstract).items()}


def _misfit(
    stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> str | None:
    """The first array that is missing, of another shape, or too many."""
    for name, shape in wanted.items():
        if name not in stored:
            return f"it has no {name}"
        if stored[name] != shape:
            return f"{name} has shape {stored[name]}, not {shape}"
    surplus = [name for name in stored if name not in wanted]
    return f"it has {surplus[0]}, which this model has not" if surplus else None
