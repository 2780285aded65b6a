"""The life of a run over all its sessions: when it began, how often it was begun again."""

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from clip_jax.checkpoint import Workdir, write_atomically


class Session:
    """One call of `train`, as one of the sessions of a run. Make it when the call begins.

    Goodput is the productive time of the steps that count over the time since the run was first
    begun: what was computed twice, waited for, compiled, saved, scored, or lost between a crash
    and the restart is in the denominator alone. A step that counts is one that stands in the
    history of the weights. sessions.jsonl in the workdir keeps when each session began, whatever
    becomes of the lines in metrics.jsonl; those that a resume keeps hold the productive time.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self._unix_start = self._first_start = time.time()
        self._restarts: int | None = None  # not begun
        self._train_seconds = 0.0  # of the sessions before
        self._productive = 0.0  # seconds, of all sessions

    def begin(self, workdir: Workdir, first_step: int, lines: Iterable[Mapping[str, Any]]) -> None:
        """Takes up the run at `first_step`, again after each rewind; the first process writes.

        lines: of metrics.jsonl; those after `first_step` do not count.
        """
        kept = [line for line in lines if line["step"] <= first_step]
        self._productive = _last(kept, "productive_seconds")
        if self._restarts is not None:
            return  # a rewind: the same session
        self._train_seconds = _last(kept, "train_seconds")
        path = workdir.path / "sessions.jsonl"
        texts = path.read_text().splitlines() if path.exists() else []
        self._restarts = len(texts)
        if texts:
            self._first_start = json.loads(texts[0])["unix_time"]
        if jax.process_index() == 0:
            texts.append(json.dumps({"unix_time": self._unix_start, "step": first_step}))
            write_atomically(path, "".join(text + "\n" for text in texts))

    def figures(self, productive_seconds: float) -> dict[str, float]:
        """At a log line. productive_seconds: of the lap that ends with it."""
        self._productive += productive_seconds
        now = time.time()
        life = max(now - self._first_start, 1e-9)
        return {
            "train_seconds": self._train_seconds + time.perf_counter() - self.start,
            "productive_seconds": self._productive,
            "goodput": min(self._productive / life, 1.0),
            "restarts": float(self._restarts or 0),
            "unix_time": now,
        }


def _last(lines: list[Mapping[str, Any]], name: str) -> float:
    return next((line[name] for line in reversed(lines) if line.get(name) is not None), 0.0)
