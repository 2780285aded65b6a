"""Scoring a run that is on disk."""

import contextlib

import jax

from clip_jax.checkpoint import SKIP, AnyPath, CheckpointStore, Workdir
from clip_jax.config import ExperimentConfig, UserError
from clip_jax.data.sources import cache_dir
from clip_jax.evaluation.evaluate import Evaluator, metrics_line
from clip_jax.evaluation.run_report import write_run_report
from clip_jax.parallel import make_mesh
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import abstract_state, count_parameters
from clip_jax.training.vocabulary import kept_tokenizer


def evaluate_run(
    config: ExperimentConfig, workdir: Workdir, *, step: int | None = None
) -> tuple[dict[str, float], AnyPath]:
    """Scores the checkpoint of `step` (default: the latest) and writes its report.

    Returns the scores as in metrics.jsonl, to which nothing is added, and the report's path. Raises
    UserError where there is no such checkpoint or no evaluation set. The optimizer's state is not
    read.
    """
    if not config.evaluation.sets:
        raise UserError(
            "config.evaluation.sets is empty; add a set to score, as in "
            "--config.evaluation.sets.mine.path=pairs.tar"
        )
    mesh = make_mesh(config)
    task = ContrastiveTask(config, mesh)
    tokenizer = kept_tokenizer(workdir.tokenizer)
    evaluator = Evaluator(task, tokenizer, config, mesh, cache_dir(config.data))
    abstract = abstract_state(
        task,
        make_optimizer(config, task.trainable),
        mesh,
        ema=config.optimizer.ema_decay is not None,
    )
    use_ema = config.evaluation.use_ema
    with contextlib.closing(CheckpointStore(workdir.checkpoints)) as store:
        unread = {
            name: jax.tree.map(lambda _: SKIP, getattr(abstract, name))
            for name in ("opt_state", "skipped", "params" if use_ema else "ema")
        }
        state = store.restore(abstract._replace(**unread), step)
    results = evaluator(state.ema if use_ema else state.params, state.model_state)
    report = workdir.report
    if jax.process_index() == 0:
        report = write_run_report(
            workdir,
            config,
            results,
            step=int(state.step),
            num_parameters=count_parameters(abstract.params),
        )
    return metrics_line(results), report
