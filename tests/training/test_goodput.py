import json
import time

import pytest

from clip_jax.checkpoint import Workdir
from clip_jax.training import goodput
from clip_jax.training.goodput import Session


class Time:
    """A clock that the test sets: both of `time`'s, which goodput reads."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now - 500


@pytest.fixture
def clock(monkeypatch):
    clock = Time()
    monkeypatch.setattr(goodput, "time", clock)
    return clock


def line(step, figures):
    return {"step": step, "loss": 1.0, **figures}


def test_goodput_over_a_crash_and_a_restart(tmp_path, clock):
    """100 s, of which 60 s of steps that count; 20 s of them are lost to a crash."""
    workdir, lines = Workdir(tmp_path), []
    first = Session()
    first.begin(workdir, 0, lines)
    for step in (10, 20, 30):
        clock.now += 25
        lines.append(line(step, first.figures(20.0)))
    assert lines[-1]["goodput"] == pytest.approx(60 / 75)
    assert lines[-1]["restarts"] == 0

    clock.now += 100  # between the crash and the restart
    second = Session()
    clock.now += 5  # restoring the checkpoint of step 20
    second.begin(workdir, 20, lines)
    lines = [kept for kept in lines if kept["step"] <= 20]
    clock.now += 25
    lines.append(line(30, second.figures(20.0)))
    assert lines[-1]["goodput"] == pytest.approx(60 / 205)
    assert lines[-1]["restarts"] == 1
    assert lines[-1]["productive_seconds"] == 60
    assert lines[-1]["train_seconds"] == 50 + 30
    assert lines[-1]["unix_time"] == 1205


def test_sessions_of_which_no_line_is_left_count(tmp_path, clock):
    workdir = Workdir(tmp_path)
    for _ in range(3):  # crash before their first checkpoint
        session = Session()
        session.begin(workdir, 0, [])
        clock.now += 100
    session = Session()
    session.begin(workdir, 0, [])
    clock.now += 100
    assert session.figures(80.0)["goodput"] == pytest.approx(80 / 400)
    starts = [json.loads(text) for text in (tmp_path / "sessions.jsonl").read_text().splitlines()]
    assert starts == [{"unix_time": 1000 + 100 * k, "step": 0} for k in range(4)]


def test_a_rewind_is_no_restart_and_its_steps_count_once(tmp_path, clock):
    workdir, lines = Workdir(tmp_path), []
    session = Session()
    session.begin(workdir, 0, lines)
    for step in (10, 20):
        clock.now += 10
        lines.append(line(step, session.figures(10.0)))
    session.begin(workdir, 10, lines)
    clock.now += 10
    figures = session.figures(10.0)
    assert figures["productive_seconds"] == 20
    assert figures["train_seconds"] == 30  # all of it was trained
    assert figures["restarts"] == 0
    assert figures["goodput"] == pytest.approx(20 / 30)


def test_lines_of_evaluations_and_of_older_runs_are_passed_over(tmp_path):
    session = Session()
    lines = [
        {"step": 10, "train_seconds": 7.0, "productive_seconds": 5.0},
        {"step": 10, "eval/set/R@1": 0.5},
        {"step": 20, "train_seconds": 9.0},
    ]
    session.begin(Workdir(tmp_path), 20, lines)
    figures = session.figures(0.0)
    assert figures["train_seconds"] == pytest.approx(9.0, abs=1)
    assert figures["productive_seconds"] == 5.0
    assert figures["unix_time"] == pytest.approx(time.time(), abs=60)
