import math

import pytest

from clip_jax.checkpoint.retention import (
    drop_scores_after,
    read_scores,
    reasons_to_keep,
    write_score,
)
from clip_jax.config import CheckpointConfig

STEPS = [10, 20, 30, 40, 50]


def kept(scores=None, steps=STEPS, **config) -> list[int]:
    return sorted(reasons_to_keep(steps, scores or {}, CheckpointConfig(**config)))


def test_the_latest_stay():
    assert kept(keep_latest=2) == [40, 50]
    assert kept(keep_latest=9) == STEPS
    assert kept(keep_latest=2, steps=[]) == []


def test_the_newest_stays_whatever_is_asked_for():
    assert kept(keep_latest=0) == [50]
    assert kept(keep_latest=0, keep_best=1, scores={10: 0.9, 50: 0.1}) == [10, 50]


def test_every_so_many_steps_stay_for_good():
    assert kept(keep_latest=1, keep_every_steps=20) == [20, 40, 50]


def test_the_best_stay_and_of_equal_ones_the_later():
    scores = {10: 0.5, 20: 0.9, 30: 0.9, 40: 0.1}
    assert kept(scores, keep_latest=1, keep_best=1) == [30, 50]
    assert kept(scores, keep_latest=1, keep_best=3) == [10, 20, 30, 50]
    assert kept(scores, keep_latest=1, keep_best=9) == [10, 20, 30, 40, 50]
    assert kept({99: 1.0, **scores}, keep_latest=1, keep_best=1) == [30, 50]  # 99 is not there


def test_reasons_are_named():
    config = CheckpointConfig(keep_latest=1, keep_every_steps=50, keep_best=1)
    assert reasons_to_keep(STEPS, {50: 1.0}, config) == {50: ["latest", "best", "every 50"]}


def test_scores_are_written_down(workdir):
    folder = workdir.checkpoints
    folder.mkdir(parents=True)
    assert read_scores(folder) == {}
    write_score(folder, 10, 0.25)
    write_score(folder, 20, math.nan)  # an evaluation that failed is not the best
    write_score(folder, 30, 0.5)
    write_score(folder, 10, 0.75)
    assert read_scores(folder) == {10: 0.75, 30: 0.5}


@pytest.mark.parametrize("text", ["", "[1]", '{"10": "high"}'])
def test_broken_scores_are_none(tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    assert read_scores(tmp_path) == {}


def test_scores_of_steps_that_come_again_are_forgotten(tmp_path):
    for step, score in ((100, 0.5), (200, 0.6)):
        write_score(tmp_path, step, score)
    drop_scores_after(tmp_path, 100)
    assert read_scores(tmp_path) == {100: 0.5}
