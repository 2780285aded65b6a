"""A training run from config to report. Reads from top to bottom."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from clip_jax.checkpoint import (
    CheckpointStore,
    Workdir,
    drop_bad_samples_after,
    drop_metrics_after,
    leaves_by_path,
    read_metrics,
    write_atomically,
)
from clip_jax.config import ExperimentConfig, UserError, check_frozen
from clip_jax.data.sources import cache_dir
from clip_jax.evaluation.evaluate import Evaluator
from clip_jax.parallel import BATCH_AXES, from_first_process, make_mesh, to_global_batch
from clip_jax.parallel.host_memory import keep_freed_memory
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.clock import Clock, split_wait
from clip_jax.training.goodput import Session
from clip_jax.training.input import TrainingInput, describe_sources, open_sources
from clip_jax.training.measured import count_epochs, keep_measured, measure_packing
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.origin import find_origin
from clip_jax.training.profiling import Profiler
from clip_jax.training.quarantine import listed, put_in
from clip_jax.training.recompiles import CompileWatch, watch_compiles
from clip_jax.training.resume import check_workdir, describe_changes
from clip_jax.training.run import Run, all_scores, check_best, note_best, scores_at
from clip_jax.training.saving import SaveTimes
from clip_jax.training.schedule import make_schedule
from clip_jax.training.signals import Interrupts, how_to_resume, interrupts, should_stop
from clip_jax.training.stability import LossSpikeError, SpikeDetector, check_skipped
from clip_jax.training.state import abstract_state
from clip_jax.training.step import TrainStep, make_train_step
from clip_jax.training.telemetry import MetricsWriter, ProgressLine, check_logging, expand
from clip_jax.training.throughput import host_memory_in_use, make_throughput, memory_in_use
from clip_jax.training.vocabulary import prepare_tokenizer


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    step: int
    finished: bool  # False: interrupted, and saved
    scores: dict[str, float]  # of the last evaluation, as in metrics.jsonl


def train(
    config: ExperimentConfig, workdir: Workdir, *, allow_config_change: bool = False
) -> Outcome:
    """Trains to `config.num_steps`, from the latest checkpoint in `workdir` where there is one.

    config: validated. Raises UserError for what the user can mend, before anything is changed.
    """
    session = Session()
    with contextlib.ExitStack() as resources:
        compiles = resources.enter_context(watch_compiles())
        interrupted = resources.enter_context(interrupts())
        # ---- Workdir: may this run go on here? -------------------------------------------------
        config = keep_measured(config, workdir)
        changes = check_workdir(workdir, config, allow_config_change=allow_config_change)
        check_logging(config)
        lock = resources.enter_context(workdir.lock()) if jax.process_index() == 0 else None

        # ---- Devices ---------------------------------------------------------------------------
        mesh = make_mesh(config)

        # ---- Data and tokenizer ----------------------------------------------------------------
        cache = cache_dir(config.data)
        sources = open_sources(config, cache)
        config = count_epochs(config, sources)
        tokenizer = prepare_tokenizer(config, sources, workdir)
        sharing = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        config = measure_packing(config, sources, tokenizer, num_devices=sharing)

        # ---- Model, optimizer, evaluation ------------------------------------------------------
        task = ContrastiveTask(config, mesh)
        optimizer = make_optimizer(config, task.trainable, mesh=mesh)
        schedule = make_schedule(config)
        abstract = abstract_state(task, optimizer, mesh, ema=config.optimizer.ema_decay is not None)
        check_frozen(config, leaves_by_path(abstract.params))
        evaluator = Evaluator(task, tokenizer, config, mesh, cache)
        check_best(config, evaluator)
        train_step = make_train_step(
            task,
            optimizer,
            schedule,
            abstract,
            mesh,
            seed=config.seed,
            ema_decay=config.optimizer.ema_decay,
            with_layer_norms=config.logging.layer_norms,
        )

        # ---- From here on, again after each loss spike -----------------------------------------
        run = Run(
            config=config,
            workdir=workdir,
            mesh=mesh,
            sources=sources,
            tokenizer=tokenizer,
            task=task,
            optimizer=optimizer,
            schedule=schedule,
            abstract=abstract,
            evaluator=evaluator,
            throughput=make_throughput(config, task),
            lock=lock,
        )
        while True:
            # A run that goes back begins again at its checkpoint, as after a restart.
            with contextlib.suppress(LossSpikeError):
                return _go_on(
                    run,
                    train_step,
                    session,
                    compiles,
                    interrupted,
                    changes,
                    allow_config_change=allow_config_change,
                )


def _go_on(
    run: Run,
    train_step: TrainStep,
    session: Session,
    compiles: CompileWatch,
    interrupted: Interrupts,
    changes: Mapping[str, tuple[Any, Any]],
    *,
    allow_config_change: bool,
) -> Outcome:
    """Trains from the latest checkpoint to the end. Raises LossSpikeError to begin again there."""
    config, workdir = run.config, run.workdir
    is_first_process = jax.process_index() == 0
    with contextlib.ExitStack() as resources:
        # ---- Where the run stands --------------------------------------------------------------
        store: CheckpointStore | None = None
        if from_first_process(workdir.exists()):
            store = resources.enter_context(
                contextlib.closing(CheckpointStore(workdir.checkpoints, config.checkpoint))
            )
        origin = find_origin(config, workdir, store, run.abstract)
        first_step = origin.step
        quarantine = tuple(sorted({*origin.quarantine, *listed(workdir)}))
        batches = resources.enter_context(
            contextlib.closing(
                TrainingInput(
                    config,
                    run.sources,
                    run.tokenizer,
                    first_sample=origin.samples_seen,
                    saved=origin.position,
                    quarantine=quarantine,
                    workdir=workdir,
                    allow_config_change=allow_config_change,
                )
            )
        )
        earlier = read_metrics(workdir.metrics)

        # ---- All checks have passed: from here on files change ---------------------------------
        drop_bad_samples_after(workdir.bad_samples(jax.process_index()), batches.place)
        if is_first_process:
            drop_metrics_after(workdir.metrics, first_step)
            write_atomically(workdir.tokenizer, run.tokenizer.to_json())
            workdir.save_config(config)
        if store is None:
            store = resources.enter_context(
                contextlib.closing(CheckpointStore(workdir.checkpoints, config.checkpoint))
            )
        store.drop_scores_after(first_step)
        state = origin.make_state(run.task, run.optimizer, run.abstract, seed=config.seed)
        origin = dataclasses.replace(origin, state=None, arrays={})  # else they stay for good

        # ---- Telemetry -------------------------------------------------------------------------
        earlier = [line for line in earlier if line["step"] <= first_step]
        writer = None
        if is_first_process:
            writer = resources.enter_context(
                contextlib.closing(MetricsWriter(workdir, config, first_step=first_step))
            )
        progress = resources.enter_context(
            contextlib.closing(
                ProgressLine(
                    first_step=first_step, num_steps=config.num_steps, silent=not is_first_process
                )
            )
        )
        progress.say(
            f"{config.name}: {run.num_parameters:,} parameters, {jax.device_count()} devices as "
            f"{dict(run.mesh.shape)}, {describe_sources(config, run.sources)}"
        )
        for line in (*describe_changes(changes), origin.said):
            if line:
                progress.say(line)
        train_step = compiles.watching(train_step, "state", "batch", first_step=first_step)
        clock = Clock(first_step, session=session, compiles=compiles)
        profiler = resources.enter_context(
            contextlib.closing(Profiler(config, workdir, first_step=first_step, say=progress.say))
        )
        scores = scores_at(first_step, earlier)
        note_best(config, store, all_scores(earlier))

        def samples_seen(step: int) -> int:
            return origin.samples_seen + (step - first_step) * config.global_batch_size

        # ---- What an earlier call left undone --------------------------------------------------
        if first_step and from_first_process(run.lacks_evaluation(first_step, scores)):
            with clock.spending("evaluation"):
                scores = run.evaluate(first_step, state, store, writer)
        if first_step >= config.num_steps:
            return Outcome(first_step, finished=True, scores=scores)

        # ---- Loop ------------------------------------------------------------------------------
        session.begin(workdir, first_step, earlier)
        detector = SpikeDetector(config.stability, origin.losses)
        saves_at = SaveTimes(config)
        local_batch_size = config.global_batch_size // jax.process_count()
        pending: tuple[int, dict[str, jax.Array]] | None = None  # sent to the devices

        def log(step: int, metrics: Mapping[str, jax.Array]) -> None:
            values = expand(jax.device_get(metrics))
            values |= clock.lap(step, local_batch_size=local_batch_size) | batches.figures()
            values |= split_wait(values) | run.throughput.figures(values["steps_per_second"])
            values |= memory_in_use() | host_memory_in_use()
            values["samples_seen"] = samples_seen(step)
            if writer is not None:
                writer.write(step, values)
            store.check()
            remaining = (config.num_steps - step) / values["steps_per_second"]
            progress.update(step, values | {"eta_seconds": remaining})
            check_skipped(config.stability, step, int(values["skipped_steps_in_row"]))

        def settle() -> None:
            """Waits for the pending step, looks at its loss and logs it where that is due."""
            nonlocal pending
            if pending is None:
                return
            (step, metrics), pending = pending, None
            jax.block_until_ready(metrics["loss"])
            if step == first_step + 1:
                keep_freed_memory()
            if config.stability.spike_zscore is not None:
                try:
                    detector.check(step, float(jax.device_get(metrics["loss"])))
                except LossSpikeError as spike:
                    end = samples_seen(step) - origin.samples_seen
                    first = end - config.stability.spike_steps * config.global_batch_size
                    places = batches.places(max(first, 0), end)
                    put_in(workdir, spike, places, max_rewinds=config.stability.max_rewinds)
                    progress.say(f"{spike}; going back, on without samples {places} of the order")
                    raise
            if step % config.logging.every_steps == 0 or step == config.num_steps:
                log(step, metrics)

        def save(step: int) -> None:
            with clock.spending("checkpoint"):
                if run.lock is not None:
                    run.lock.check()  # another machine may have taken the run over
                batches.flush()
                if writer is not None:
                    writer.flush()  # a checkpoint has all lines up to it
                metadata = run.metadata(samples_seen(step), batches, detector.losses, quarantine)
                store.save(step, state, metadata)
            saves_at.saved()

        with interrupted.saving():
            for step in range(first_step + 1, config.num_steps + 1):
                try:
                    with clock.waiting(pending[1]["loss"] if pending is not None else None):
                        local_batch = next(batches)
                        with clock.transferring():
                            batch = to_global_batch(local_batch, run.mesh)
                except UserError:
                    # The data went bad on the way. Saving takes all processes; one would hang.
                    if step - 1 > first_step and jax.process_count() == 1:
                        settle()
                        save(step - 1)
                        store.wait()
                        progress.say(how_to_resume(workdir, step - 1))
                    raise
                profiler.before(step)
                with jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, batch)
                profiler.after(step, metrics)
                # Two steps in flight keep the device busy; more would only hold their batches. The
                # step before is looked at while the device is busy with this one.
                settle()
                pending = (step, metrics)
                last = step == config.num_steps
                stop = should_stop(interrupted, step)
                saves = saves_at.due(step) or stop
                evaluates = run.evaluates(step) and not (last or stop)
                # ---- Log, save, evaluate: in this order, so that a resume finds all three ------
                if saves or evaluates:
                    settle()  # nothing of a spike is ever saved
                if saves:
                    save(step)
                if stop:
                    store.wait()
                    progress.say(how_to_resume(workdir, step))
                    return Outcome(step, finished=False, scores=scores)
                if evaluates:
                    with clock.spending("evaluation"):
                        scores = run.evaluate(step, state, store, writer)
        # ---- Final evaluation: all is on disk, so that nothing can be lost any more ------------
        store.wait()
        if run.evaluates(config.num_steps):
            try:
                scores = run.evaluate(config.num_steps, state, store, writer)
            except KeyboardInterrupt:
                progress.say(how_to_resume(workdir, config.num_steps))
                return Outcome(config.num_steps, finished=False, scores=scores)
        return Outcome(config.num_steps, finished=True, scores=scores)
