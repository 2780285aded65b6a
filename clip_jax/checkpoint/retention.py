"""Which checkpoints of a run stay."""

import json
import math
from collections.abc import Iterable

from clip_jax.checkpoint.paths import AnyPath, write_atomically
from clip_jax.config import CheckpointConfig

_SCORES = "scores.json"


def reasons_to_keep(
    steps: Iterable[int], scores: dict[int, float], config: CheckpointConfig
) -> dict[int, list[str]]:
    """Why each step that stays does; the newest always does.

    steps: of complete checkpoints. scores: the higher the better; of equal ones the later stays.
    """
    ordered = sorted(steps)
    reasons: dict[int, list[str]] = {}
    for step in ordered[-max(1, config.keep_latest) :]:
        reasons.setdefault(step, []).append("latest")
    scored = [step for step in ordered if step in scores]
    scored.sort(key=lambda step: (scores[step], step))
    for step in scored[len(scored) - min(config.keep_best, len(scored)) :]:
        reasons.setdefault(step, []).append("best")
    for step in ordered:
        if config.keep_every_steps is not None and step % config.keep_every_steps == 0:
            reasons.setdefault(step, []).append(f"every {config.keep_every_steps}")
    return reasons


def read_scores(directory: AnyPath) -> dict[int, float]:
    """The scores of the checkpoints in `directory` that have one; no others are finite."""
    try:
        scores = json.loads((directory / _SCORES).read_text(encoding="utf-8"))
        return {int(step): float(value) for step, value in scores.items()}
    except (FileNotFoundError, ValueError, AttributeError):
        return {}  # metrics.jsonl has them: a run that goes on notes them again


def write_score(directory: AnyPath, step: int, value: float) -> None:
    """Adds one; what is not finite is no score."""
    scores = read_scores(directory)
    if math.isfinite(value) and scores.get(step) != value:
        write_atomically(directory / _SCORES, json.dumps({**scores, step: value}))


def drop_scores_after(directory: AnyPath, step: int) -> None:
    """Keeps the scores up to `step`: later ones are of weights that the run has left."""
    scores = read_scores(directory)
    kept = {scored: value for scored, value in scores.items() if scored <= step}
    if kept != scores:
        write_atomically(directory / _SCORES, json.dumps(kept))
