"""One run: what it is made of, and how it is saved, scored and sent back."""

import dataclasses
import shlex
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from clip_jax.checkpoint import CheckpointStore, Lock, Workdir, add_quarantine, read_quarantine
from clip_jax.config import ExperimentConfig, UserError, to_dict
from clip_jax.data.record import Source
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.evaluation.evaluate import Evaluator, metrics_line
from clip_jax.evaluation.run_report import write_run_report
from clip_jax.parallel import from_first_process
from clip_jax.tasks import Task
from clip_jax.training.input import TrainingInput
from clip_jax.training.stability import LossSpikeError
from clip_jax.training.state import TrainState, count_parameters
from clip_jax.training.telemetry import MetricsWriter
from clip_jax.training.throughput import Throughput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """All that stays the same from the first step to the last, whatever happens between."""

    config: ExperimentConfig
    workdir: Workdir
    mesh: Mesh
    sources: dict[str, Source]
    tokenizer: Tokenizer
    task: Task
    optimizer: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    abstract: TrainState
    evaluator: Evaluator
    throughput: Throughput
    lock: Lock | None  # of the workdir, on the first process

    @property
    def num_parameters(self) -> int:
        return count_parameters(self.abstract.params)

    # ---- Saving ----------------------------------------------------------------------------------

    def metadata(
        self, samples_seen: int, batches: TrainingInput, losses: list[float]
    ) -> dict[str, Any]:
        """What a checkpoint needs beside the state. A collective where sources stream."""
        return {
            "samples_seen": samples_seen,
            "data": batches.position(),
            "losses": losses,
            "config": to_dict(self.config),
            "tokenizer": self.tokenizer.to_json(),
        }

    # ---- Evaluation ------------------------------------------------------------------------------

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

    def evaluate(
        self, step: int, state: TrainState, store: CheckpointStore, writer: MetricsWriter | None
    ) -> dict[str, float]:
        """Scores as in metrics.jsonl, where `writer` puts them; after the last step a report too.

        writer: None on all processes but the first.
        """
        params = state.ema if self.config.evaluation.use_ema else state.params
        try:
            results = self.evaluator(params, state.model_state)
        except UserError as error:
            if store.latest_step() != step:
                raise
            workdir = shlex.quote(str(self.workdir.path))
            raise UserError(
                f"{error}; step {step} is saved: after that, clip-jax eval --workdir={workdir}"
            ) from None
        scores = metrics_line(results)
        note_best(self.config, store, {step: scores})
        if writer is not None:
            writer.write(step, scores)
            if self.config.evaluation.report and step == self.config.num_steps:
                write_run_report(
                    self.workdir,
                    self.config,
                    results,
                    step=step,
                    num_parameters=self.num_parameters,
                )
        return scores

    # ---- Going back ------------------------------------------------------------------------------

    def quarantined(self) -> tuple[tuple[int, int], ...]:
        """Ranges of places that the run passes over; all processes get those of the first."""
        is_first_process = jax.process_index() == 0
        entries = read_quarantine(self.workdir) if is_first_process else []
        numbers = [number for entry in entries for number in (entry["from"], entry["to"])]
        count = from_first_process(len(numbers))
        numbers = [from_first_process(numbers[i] if is_first_process else 0) for i in range(count)]
        return tuple(zip(numbers[::2], numbers[1::2], strict=True))

    def quarantine(self, spike: LossSpikeError, places: tuple[int, int]) -> None:
        """Lists the samples of a spike, so that this run passes over them from now on.

        places: of the samples, [from, to). Raises UserError where the run went back too often.
        """
        limit = self.config.stability.max_rewinds
        if len(self.quarantined()) >= limit:
            raise UserError(
                f"{spike}, and the run went back as often as config.stability.max_rewinds {limit} "
                "allows; lower config.optimizer.learning_rate or raise max_rewinds"
            )
        if jax.process_index() == 0:
            entry = {"from": places[0], "to": places[1], "step": spike.step}
            add_quarantine(
                self.workdir, entry | {"loss": spike.loss, "zscore": round(spike.zscore, 2)}
            )


def note_best(
    config: ExperimentConfig, store: CheckpointStore, scores: dict[int, dict[str, float]]
) -> None:
    """Tells the store the scores it keeps the best by. Raises UserError for an unknown metric."""
    metric = config.checkpoint.best_metric
    if not config.checkpoint.keep_best:
        return
    for step, values in scores.items():
        if metric not in values:
            near = ", ".join(sorted(name for name in values if "/chance" not in name))
            raise UserError(f"config.checkpoint.best_metric {metric!r} is none of {near}")
        store.note_score(step, values[metric])


def scores_at(step: int, lines: list[dict[str, Any]]) -> dict[str, float]:
    """The last evaluation line of `step`, {} where there is none."""
    return all_scores(lines).get(step, {})


def all_scores(lines: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """The last evaluation line of each step that has one."""
    return {
        line["step"]: {key: value for key, value in line.items() if key != "step"}
        for line in lines
        if any(key.startswith("eval/") for key in line)
    }
