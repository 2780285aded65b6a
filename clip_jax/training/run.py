"""One run: what it is made of, and how it is saved, scored and sent back."""

import dataclasses
import shlex
from typing import Any

import optax
from jax.sharding import Mesh

from clip_jax.checkpoint import CheckpointStore, Lock, Workdir
from clip_jax.config import ExperimentConfig, UserError, to_dict
from clip_jax.data.record import Source
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.evaluation.evaluate import Evaluator, metrics_line
from clip_jax.evaluation.run_report import write_run_report
from clip_jax.tasks import Task
from clip_jax.training.input import TrainingInput
from clip_jax.training.quarantine import Range
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
        self,
        samples_seen: int,
        batches: TrainingInput,
        losses: list[float],
        quarantine: tuple[Range, ...],
    ) -> dict[str, Any]:
        """What a checkpoint needs beside the state. A collective where sources stream."""
        return {
            "samples_seen": samples_seen,
            "data": batches.position(),
            "losses": losses,
            "quarantine": quarantine,
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


def check_best(config: ExperimentConfig, evaluator: Evaluator) -> None:
    """Raises UserError where no evaluation gives the score by which checkpoints are kept."""
    metric, names = config.checkpoint.best_metric, evaluator.metric_names()
    if config.checkpoint.keep_best and metric not in names:
        raise UserError(
            f"config.checkpoint.best_metric {metric!r} is none of the scores: {', '.join(names)}"
        )


def note_best(
    config: ExperimentConfig, store: CheckpointStore, scores: dict[int, dict[str, float]]
) -> None:
    """Tells the store the scores that it keeps the best by, of those that have them."""
    metric = config.checkpoint.best_metric
    for step, values in scores.items() if config.checkpoint.keep_best else ():
        if metric in values:
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
