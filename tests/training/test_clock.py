import contextlib

import jax
import jax.numpy as jnp
import pytest

from clip_jax.checkpoint import Workdir
from clip_jax.training import clock as clock_module
from clip_jax.training.clock import Clock, split_wait
from clip_jax.training.goodput import Session
from clip_jax.training.recompiles import CompileWatch

SHARES = ("step", "data_wait", "checkpoint", "evaluation", "compile")


class Time:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Run:
    """A clock, and what a loop does with it, in seconds of a time of its own."""

    def __init__(self, monkeypatch, workdir) -> None:
        self.time = Time()
        monkeypatch.setattr(clock_module, "time", self.time)
        self.compiles = CompileWatch(pytest.fail)
        session = Session()
        session.begin(workdir, 3, [])
        self.clock = Clock(3, session=session, compiles=self.compiles)

    def step(self, seconds: float) -> None:
        self.time.now += seconds

    def compile(self, seconds: float) -> None:
        event, start = "/jax/core/compile/backend_compile_duration", self.time.now
        self.time.now += seconds
        self.compiles.on_span(event, start, self.time.now, fun_name="f")

    def wait(self, seconds: float, *, transfer: float = 0.0, in_flight=None) -> None:
        with self.clock.waiting(in_flight):
            self.time.now += seconds - transfer
            with self.clock.transferring():
                self.time.now += transfer

    def lap(self, step: int) -> dict[str, float]:
        figures = self.clock.lap(step, local_batch_size=10)
        assert sum(figures[f"time/{name}"] for name in SHARES) == pytest.approx(1)
        return figures


@pytest.fixture
def run(monkeypatch, tmp_path):
    return Run(monkeypatch, Workdir(tmp_path))


def test_where_the_time_of_a_lap_goes(run):
    run.compile(20)
    run.wait(10, transfer=4)
    run.step(30)
    with run.clock.spending("checkpoint"):
        run.step(5)
    with run.clock.spending("evaluation"):
        run.step(15)
        run.compile(8)
    run.step(12)
    figures = run.lap(7)
    assert {name: figures[f"time/{name}"] for name in SHARES} == pytest.approx(
        {"step": 0.42, "data_wait": 0.1, "checkpoint": 0.05, "evaluation": 0.15, "compile": 0.28}
    )
    # Of training alone: 42 s of steps and 10 s of waiting.
    assert figures["steps_per_second"] == pytest.approx(4 / 52)
    assert figures["data_wait"] == pytest.approx(10 / 52)
    assert figures["data_wait/transfer"] == pytest.approx(4 / 52)
    assert figures["data/transfer_ms"] == pytest.approx(4000 / 40)
    assert figures["productive_seconds"] == pytest.approx(42)
    assert figures["compile_seconds"] == 28


def test_laps_do_not_run_into_one_another(run):
    run.compile(20)
    with run.clock.spending("checkpoint"):
        run.step(5)
    run.lap(4)
    run.step(9)
    run.wait(1)
    figures = run.lap(6)
    assert figures["time/step"] == pytest.approx(0.9)
    assert figures["time/data_wait"] == pytest.approx(0.1)
    assert figures["steps_per_second"] == pytest.approx(2 / 10)
    assert figures["compile_seconds"] == 20
    assert figures["productive_seconds"] == pytest.approx(9)


def test_a_wait_in_which_the_devices_are_busy_is_none(run):
    class Busy:
        def is_ready(self) -> bool:
            return False

    run.wait(10, in_flight=Busy())
    assert run.lap(4)["time/data_wait"] == 0
    run.wait(10, in_flight=jax.block_until_ready(jnp.zeros(())))
    assert run.lap(5)["time/data_wait"] == 1


def test_what_fails_within_counts(run):
    with contextlib.suppress(KeyError), run.clock.spending("evaluation"):
        run.step(5)
        raise KeyError
    run.step(5)
    assert run.lap(4)["time/evaluation"] == pytest.approx(0.5)


def test_the_wait_is_shared_out_by_work():
    milliseconds = {"read": 1.0, "decode": 6.0, "tokenize": 2.0, "batch": 1.0}
    figures = {f"data/{stage}_ms": ms for stage, ms in milliseconds.items()}
    figures |= {"data_wait": 0.5, "data_wait/transfer": 0.1}
    shares = split_wait(figures)
    assert shares["data_wait/decode"] == pytest.approx(0.4 * 0.6)
    assert sum(shares.values()) + 0.1 == pytest.approx(0.5)
    assert sum(split_wait(dict.fromkeys(figures, 0.0)).values()) == 0
