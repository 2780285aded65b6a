"""Real processes over loopback: what ends one of them ends all, at once and in one line."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_jax.parallel import together

HEARTBEAT_SECONDS = 30
RESTART = "start them all again with the same command, and the run resumes from its last checkpoint"


@contextlib.contextmanager
def processes(
    folder: Path, count: int, fault: str = "", faulty: int = 0
) -> Iterator[list[subprocess.Popen[str]]]:
    """`dying.py` in `count` processes that have met; killed at the end."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("dying.py")
    numbers = (count, port, HEARTBEAT_SECONDS)
    started = []
    for rank in range(count):
        out, errors = folder / f"{rank}.out", folder / f"{rank}.err"
        with out.open("w") as stdout, errors.open("w") as stderr:
            arguments = [sys.executable, script, *map(str, (rank, *numbers)), fault, str(faulty)]
            started.append(subprocess.Popen(arguments, stdout=stdout, stderr=stderr, text=True))
    try:
        for rank, process in enumerate(started):
            while "ready\n" not in (folder / f"{rank}.out").read_text():
                assert process.poll() is None, (folder / f"{rank}.err").read_text()
                time.sleep(0.05)
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def outcomes(folder: Path, *started: subprocess.Popen[str]) -> list[tuple[int, list[str]]]:
    """Exit codes, and the lines that we said; fails where one goes on beyond the limit."""
    codes = [process.wait(timeout=HEARTBEAT_SECONDS) for process in started]
    said = [(folder / f"{process.args[2]}.err").read_text().splitlines() for process in started]
    ours = [[line for line in lines if line.startswith("clip-jax: ")] for lines in said]
    return list(zip(codes, ours, strict=True))


def test_a_killed_process_ends_the_others(tmp_path):
    """The second of three: the first hears it, and the third from the first."""
    with processes(tmp_path, 3) as (first, second, third):
        start = time.monotonic()
        second.send_signal(signal.SIGKILL)
        for code, said in outcomes(tmp_path, first, third):
            assert code == 75
            assert len(said) == 1
            assert "process 1 of 3 died" in said[0]
            assert RESTART in said[0]
        # JAX's heartbeats notice it at the limit.
        assert time.monotonic() - start < HEARTBEAT_SECONDS - 5


def test_a_killed_coordinator_ends_the_others(tmp_path):
    """JAX aborts those that lose it, and may come first."""
    with processes(tmp_path, 2) as (first, second):
        first.send_signal(signal.SIGKILL)
        [(code, said)] = outcomes(tmp_path, second)
        assert code in (75, -signal.SIGABRT)
        if code == 75:
            assert len(said) == 1
            assert "process 0 of 2 died" in said[0]
            assert RESTART in said[0]


SLOW = pytest.mark.slow  # two seconds each


@pytest.mark.parametrize("faulty", [0, pytest.param(1, marks=SLOW)])
@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("user error", 2, "the disk is full"),
        pytest.param("error", 1, "RuntimeError: a fault of ours", marks=SLOW),
    ],
)
def test_an_error_ends_the_others_with_its_message(tmp_path, faulty, fault, code, message):
    with processes(tmp_path, 2, fault, faulty) as both:
        found = outcomes(tmp_path, *both)
    assert found == [
        (code, [f"clip-jax: {message if rank == faulty else f'process {faulty}: {message}'}"])
        for rank in range(2)
    ]


def test_a_process_that_has_finished_ends_nobody(tmp_path):
    """Its connection is closed long before the other is done."""
    with processes(tmp_path, 2, "none", 1) as both:
        assert outcomes(tmp_path, *both) == [(0, []), (0, [])]
    for rank in range(2):
        assert f"finished {rank}\n" in (tmp_path / f"{rank}.out").read_text()


@SLOW
def test_a_frozen_process_is_named_and_ends_the_others(tmp_path):
    """Its kernel still answers, so JAX's heartbeats find it; we say before what is to come."""
    with processes(tmp_path, 2) as (first, second):
        second.send_signal(signal.SIGSTOP)
        try:
            assert first.wait(timeout=3 * HEARTBEAT_SECONDS) != 0
        finally:
            second.send_signal(signal.SIGCONT)
    assert "no sign of process 1 for" in (tmp_path / "0.err").read_text()


def test_strangers_at_the_port_are_sent_away():
    """A health probe, a number for a message, an endless line: the watch goes on."""
    watch = together._Watch(HEARTBEAT_SECONDS)
    assert watch._listener is not None
    port = watch._listener.getsockname()[1]
    for said in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"5\n6\n", b"x" * 10_000):
        with socket.create_connection(("localhost", port), timeout=10) as stranger:
            stranger.sendall(said)
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(65536):  # beats, until it is closed
                    pass
    with socket.create_connection(("localhost", port), timeout=10) as friend:
        friend.sendall(json.dumps({"secret": watch._secret, "process": 1}).encode() + b"\n")
        deadline = time.monotonic() + 10
        while [peer.process for peer in watch._peers] != [1]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        watch.finish()  # else the friend's going would end this process
    while watch._listener.fileno() != -1:  # until its thread has ended
        assert time.monotonic() < deadline
        time.sleep(0.01)
