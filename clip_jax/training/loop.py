"""A training run from config to report. Reads from top to bottom."""

import contextlib
import dataclasses
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from clip_jax.checkpoint import (
    CheckpointStore,
    Workdir,
    drop_bad_samples_after,
    drop_metrics_after,
    read_metrics,
)
from clip_jax.config import ExperimentConfig, UserError, to_dict
from clip_jax.data.sources import cache_dir
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.evaluation.evaluate import Evaluator, metrics_line
from clip_jax.evaluation.run_report import write_run_report
from clip_jax.parallel import from_first_process, make_mesh, to_global_batch
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.clock import Clock, split_wait
from clip_jax.training.input import (
    TrainingInput,
    describe_sources,
    keep_packing_rows,
    measure_packing_rows,
    open_sources,
)
from clip_jax.training.optimizer import make_optimizer, make_schedule
from clip_jax.training.resume import check_workdir
from clip_jax.training.start import describe, starting_arrays, with_arrays
from clip_jax.training.state import TrainState, abstract_state, count_parameters, init_state
from clip_jax.training.step import make_train_step
from clip_jax.training.telemetry import MetricsWriter, ProgressLine, check_logging
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
    start = time.perf_counter()
    is_first_process = jax.process_index() == 0
    with contextlib.ExitStack() as resources:
        # ---- Workdir: may this run go on here? -------------------------------------------------
        config = keep_packing_rows(config, workdir)
        changes = check_workdir(workdir, config, allow_config_change=allow_config_change)
        check_logging(config)
        if is_first_process:
            resources.enter_context(workdir.lock())

        # ---- Devices ---------------------------------------------------------------------------
        mesh = make_mesh(config)

        # ---- Data and tokenizer ----------------------------------------------------------------
        cache = cache_dir(config.data)
        sources = open_sources(config, cache)
        tokenizer = prepare_tokenizer(config, sources, workdir)
        config = measure_packing_rows(config, sources, tokenizer)

        # ---- Model, optimizer, evaluation ------------------------------------------------------
        task = ContrastiveTask(config, mesh)
        optimizer, schedule = make_optimizer(config, task.trainable), make_schedule(config)
        ema_decay = config.optimizer.ema_decay
        abstract = abstract_state(task, optimizer, mesh, ema=ema_decay is not None)
        evaluator = Evaluator(task, tokenizer, config, mesh, cache)

        # ---- Where the run stands --------------------------------------------------------------
        store: CheckpointStore | None = None
        first_step = first_sample = 0
        if from_first_process(workdir.exists()):
            store = resources.enter_context(
                contextlib.closing(CheckpointStore(workdir.checkpoints, config.checkpoint))
            )
            first_step = from_first_process(store.latest_step() or 0)
        saved: dict[str, Any] = {}
        if store is not None and first_step:
            metadata = store.metadata(first_step)
            first_sample, saved = metadata["samples_seen"], metadata.get("data", {})
        batches = resources.enter_context(
            contextlib.closing(
                TrainingInput(
                    config,
                    sources,
                    tokenizer,
                    first_sample=first_sample,
                    saved=saved,
                    bad_samples=workdir.bad_samples(jax.process_index()),
                    allow_config_change=allow_config_change,
                )
            )
        )
        earlier = read_metrics(workdir.metrics)
        # The latest checkpoint of the run comes before the weights it started from.
        state, starting = None, {}
        if store is not None and first_step:
            state = store.restore(abstract, first_step)
        else:
            starting = starting_arrays(config, abstract)

        # ---- All checks have passed: from here on files change ---------------------------------
        drop_bad_samples_after(workdir.bad_samples(jax.process_index()), batches.place)
        if is_first_process:
            drop_metrics_after(workdir.metrics, first_step)
            tokenizer.save(workdir.tokenizer)
            workdir.save_config(config)
        if store is None:
            store = resources.enter_context(
                contextlib.closing(CheckpointStore(workdir.checkpoints, config.checkpoint))
            )
        if state is None:
            state = with_arrays(init_state(task, optimizer, abstract, config.seed), starting)

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
        num_parameters = count_parameters(abstract.params)
        progress.say(
            f"{config.name}: {num_parameters:,} parameters, {jax.device_count()} devices as "
            f"{dict(mesh.shape)}, {describe_sources(config, sources)}"
        )
        if starting:
            progress.say(f"starting with {describe(config.start)}: {len(starting)} arrays")
        for key, (old, new) in changes.items():
            progress.say(f"config change on resume: {key} {old!r} -> {new!r}")
        if 0 < first_step < config.num_steps:
            progress.say(f"resuming {workdir.path} at step {first_step}")

        run = _Run(config, workdir, tokenizer, store, evaluator, writer, progress, num_parameters)
        clock = Clock(start, first_step, earlier=_train_seconds(earlier))
        scores = _scores_at(first_step, earlier)

        local_batch_size = config.global_batch_size // jax.process_count()

        def samples_seen(step: int) -> int:
            return first_sample + (step - first_step) * config.global_batch_size

        def log(step: int, metrics: dict[str, jax.Array]) -> None:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            values |= clock.lap(step, local_batch_size=local_batch_size) | batches.figures()
            values |= split_wait(values)
            values["samples_seen"] = samples_seen(step)
            values["samples_per_second"] = values["steps_per_second"] * config.global_batch_size
            if writer is not None:
                writer.write(step, values)
            remaining = (config.num_steps - step) / values["steps_per_second"]
            progress.update(step, values | {"eta_seconds": remaining})

        # ---- What an earlier call left undone --------------------------------------------------
        if first_step and from_first_process(run.lacks_evaluation(first_step, scores)):
            scores = run.evaluate(first_step, state)
        if first_step >= config.num_steps:
            progress.say(f"{workdir.path} is done: {first_step} steps")
            return Outcome(first_step, finished=True, scores=scores)

        # ---- Loop ------------------------------------------------------------------------------
        train_step = make_train_step(
            task, optimizer, schedule, abstract, mesh, seed=config.seed, ema_decay=ema_decay
        )
        in_flight: jax.Array | None = None
        pending: tuple[int, dict[str, jax.Array]] | None = None
        with _interrupts() as interrupted:
            for step in range(first_step + 1, config.num_steps + 1):
                try:
                    with clock.waiting(in_flight):
                        local_batch = next(batches)
                        with clock.transferring():
                            batch = to_global_batch(local_batch, mesh)
                except UserError:
                    # The data went bad on the way. Saving takes all processes; one would hang.
                    if step - 1 > first_step and jax.process_count() == 1:
                        run.save(step - 1, samples_seen(step - 1), state, batches)
                        store.wait()
                        progress.say(_how_to_resume(workdir, step - 1))
                    raise
                with jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, batch)
                # Two steps in flight keep the device busy; more would only hold their batches.
                jax.block_until_ready(in_flight)
                in_flight = metrics["loss"]
                if pending is not None:
                    log(*pending)  # the step before this one: the device is busy meanwhile
                    pending = None
                last = step == config.num_steps
                stop = _should_stop(interrupted, step)
                saves = stop or last or step % config.checkpoint.every_steps == 0
                evaluates = run.evaluates(step) and not (last or stop)
                if step % config.logging.every_steps == 0 or last:
                    pending = (step, metrics)
                # ---- Log, save, evaluate: in this order, so that a resume finds all three ------
                if pending is not None and (saves or evaluates):
                    log(*pending)
                    pending = None
                if saves:
                    run.save(step, samples_seen(step), state, batches)
                if stop:
                    store.wait()
                    progress.say(_how_to_resume(workdir, step))
                    return Outcome(step, finished=False, scores=scores)
                if evaluates:
                    scores = run.evaluate(step, state)
                if saves or evaluates:
                    clock.skip()  # the figures are of training alone
        # ---- Final evaluation: all is on disk, so that nothing can be lost any more ------------
        store.wait()
        if run.evaluates(config.num_steps):
            try:
                scores = run.evaluate(config.num_steps, state)
            except KeyboardInterrupt:
                progress.say(_how_to_resume(workdir, config.num_steps))
                return Outcome(config.num_steps, finished=False, scores=scores)
        return Outcome(config.num_steps, finished=True, scores=scores)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What saving and evaluating need, whatever the step."""

    config: ExperimentConfig
    workdir: Workdir
    tokenizer: Tokenizer
    store: CheckpointStore
    evaluator: Evaluator
    writer: MetricsWriter | None  # None on all processes but the first
    progress: ProgressLine
    num_parameters: int

    def save(self, step: int, samples_seen: int, state: TrainState, batches: TrainingInput) -> None:
        metadata = {
            "samples_seen": samples_seen,
            "data": batches.position(),
            "config": to_dict(self.config),
            "tokenizer": self.tokenizer.to_json(),
        }
        self.store.save(step, state, metadata)

    def evaluates(self, step: int) -> bool:
        every = self.config.evaluation.every_steps
        due = step == self.config.num_steps or (every and step % every == 0)
        return bool(self.config.evaluation.sets and due)

    def lacks_evaluation(self, step: int, scores: dict[str, float]) -> bool:
        """Whether the call that reached `step` ended before it was scored, or sets were added."""
        if not self.evaluates(step):
            return False
        last = step == self.config.num_steps
        no_report = last and self.config.evaluation.report and not self.workdir.report.exists()
        return no_report or any(
            f"eval/{name}/num_pairs" not in scores for name in self.config.evaluation.sets
        )

    def evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        try:
            results = self.evaluator(state.params, state.model_state)
        except UserError as error:
            if self.store.latest_step() != step:
                raise
            workdir = shlex.quote(str(self.workdir.path))
            raise UserError(
                f"{error}; step {step} is saved: after that, clip-jax eval --workdir={workdir}"
            ) from None
        scores = metrics_line(results)
        if self.writer is not None:
            self.writer.write(step, scores)
            if self.config.evaluation.report and step == self.config.num_steps:
                write_run_report(
                    self.workdir,
                    self.config,
                    results,
                    step=step,
                    num_parameters=self.num_parameters,
                )
        return scores


def _scores_at(step: int, lines: list[dict[str, Any]]) -> dict[str, float]:
    """The last evaluation line of `step`, {} where there is none."""
    return next(
        (
            {k: v for k, v in line.items() if k != "step"}
            for line in reversed(lines)
            if line["step"] == step and any(k.startswith("eval/") for k in line)
        ),
        {},
    )


def _train_seconds(lines: list[dict[str, Any]]) -> float:
    """Seconds the run has trained for already, from the last training line."""
    return next((x["train_seconds"] for x in reversed(lines) if "train_seconds" in x), 0.0)


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Sets the event on Ctrl-C or SIGTERM; a second Ctrl-C ends the process at once.

    With several processes Ctrl-C becomes SIGTERM, which JAX's preemption service brings to all of
    them, so that they stop at the same step.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(signum: int, frame: Any) -> None:
        if event.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)

    # JAX's own handler must stay in place for SIGTERM where it coordinates processes.
    signals = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
    old = {number: signal.signal(number, handle) for number in signals}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _should_stop(interrupted: threading.Event, step: int) -> bool:
    if jax.process_count() == 1:
        return interrupted.is_set()
    return multihost_utils.reached_preemption_sync_point(step)


def _how_to_resume(workdir: Workdir, step: int) -> str:
    # As it was called: by the installed script, or as a module.
    script = Path(sys.argv[0])
    program = [str(script)] if script.name == "clip-jax" else [sys.executable, "-m", "clip_jax.cli"]
    command = [*program, "train", f"--config={workdir.config}", f"--workdir={workdir.path}"]
    return f"stopped at step {step}, saved. To go on: {shlex.join(command)}"
