"""The samples that a run passes over since the loss went wrong on them: quarantine.jsonl."""

import json
import math
from collections.abc import Mapping
from typing import Any

from clip_jax.checkpoint.paths import write_atomically
from clip_jax.checkpoint.workdir import Workdir
from clip_jax.config import UserError


def read_quarantine(workdir: Workdir) -> list[dict[str, Any]]:
    """The entries in the order in which they came: ranges `from` to `to` of places in the order.

    Raises UserError, with the line, where the file is broken: to pass over it would bring the
    samples back.
    """
    try:
        text = workdir.quarantine.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [
        _entry(line, f"{workdir.quarantine} line {number}")
        for number, line in enumerate(text.splitlines(), start=1)
    ]


def add_quarantine(workdir: Workdir, entry: Mapping[str, Any]) -> None:
    """Adds an entry: {"from", "to": places, the latter not included; "step", "loss", "zscore"}.

    Written whole or not at all: a crash leaves the list with it or without it. A number that is not
    finite is kept as null. One process calls it.
    """
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in entry.items()
    }
    new = _entry(json.dumps(finite, allow_nan=False), "the new entry")
    entries = [*read_quarantine(workdir), new]
    write_atomically(workdir.quarantine, "".join(json.dumps(entry) + "\n" for entry in entries))


def _entry(text: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(text)
    except json.JSONDecodeError:
        entry = None
    if isinstance(entry, dict):
        begin, end = entry.get("from"), entry.get("to")
        if isinstance(begin, int) and isinstance(end, int) and 0 <= begin < end:
            return entry
    raise UserError(
        f'{where} is no range of samples ({{"from": 0, "to": 8, ...}}): {text[:60]!r}; mend or '
        "remove it"
    )
