"""What each command of `clip-jax checkpoints` does. Heavy imports are late.

No JAX device starts: the accelerators may be busy with the run.
"""

import argparse
import datetime
from typing import TYPE_CHECKING

from clip_jax.config.errors import UserError

if TYPE_CHECKING:
    from clip_jax.checkpoint import Workdir
    from clip_jax.checkpoint.shelf import Shelf

_MOST_NAMED = 20  # problems of a checkpoint: one bad file may be in hundreds of arrays


def ls(arguments: argparse.Namespace, _: list[str]) -> int:
    """0, whatever is found."""
    from clip_jax.checkpoint.record import read_record
    from clip_jax.checkpoint.retention import read_scores, reasons_to_keep

    workdir, shelf = _open(arguments)
    config, scores, steps = workdir.load_config().checkpoint, read_scores(shelf.directory), {}
    for step in shelf.numbered():
        steps[step] = shelf.quick_problem(step)
    whole = [step for step, problem in steps.items() if problem is None]
    reasons = reasons_to_keep(whole, scores, config)
    rows = [("step", "saved", "size", "score", "kept", "state")]
    for step, problem in steps.items():
        saved = size = "-"
        if problem is None:
            record = read_record(shelf.path(step))
            saved = f"{datetime.datetime.fromtimestamp(record.saved_at):%Y-%m-%d %H:%M:%S}"
            size = _size(record.num_bytes)
        score = f"{scores[step]:.4g}" if step in scores else "-"
        kept = ", ".join(reasons.get(step, ["-"]))
        state = "whole" if problem is None else f"damaged: {problem}"
        rows.append((str(step), saved, size, score, kept, state))
    rows += [(name, "-", "-", "-", "-", "moved aside") for name in shelf.damaged()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    return 0


def verify(arguments: argparse.Namespace, _: list[str]) -> int:
    """0 if every checkpoint asked for is what was saved, else 2."""
    shelf = _open(arguments)[1]
    damaged = False
    for step in _chosen(shelf, arguments.step or shelf.numbered()):
        problems = shelf.verify(step)
        damaged = damaged or bool(problems)
        print(
            f"{step}: {f'damaged, {len(problems)} problems' if problems else 'whole'}", flush=True
        )
        for problem in problems[:_MOST_NAMED]:
            print(f"  {problem}")
        if len(problems) > _MOST_NAMED:
            print(f"  and {len(problems) - _MOST_NAMED} more")
    return 2 if damaged else 0


def rm(arguments: argparse.Namespace, _: list[str]) -> int:
    """0. Raises UserError, before anything is removed, where the newest whole one would go."""
    shelf = _open(arguments)[1]
    if arguments.damaged:
        names = shelf.damaged()
        shelf.delete_damaged()
        print(f"removed {', '.join(names) or 'nothing'}")
        return 0
    newest = shelf.newest_whole()
    if arguments.all_but_latest:
        if newest is None:
            raise UserError(f"no checkpoint in {shelf.directory} is whole; nothing is removed")
        steps = [step for step in shelf.numbered() if step != newest]
    else:
        steps = _chosen(shelf, arguments.step)
    if newest in steps and not arguments.force:
        raise UserError(
            f"step {newest} is the newest checkpoint that is whole: without it the run goes back; "
            "--force removes it all the same"
        )
    for step in steps:
        shelf.delete(step)
    print(f"removed {', '.join(map(str, steps)) or 'nothing'}")
    return 0


def _open(arguments: argparse.Namespace) -> "tuple[Workdir, Shelf]":
    from clip_jax.checkpoint import Workdir
    from clip_jax.checkpoint.shelf import Shelf

    workdir = Workdir(arguments.workdir)
    workdir.load_config()  # a folder that is no run's is named before anything else
    return workdir, Shelf(workdir.checkpoints)


def _chosen(shelf: "Shelf", steps: list[int]) -> list[int]:
    there = shelf.numbered()
    if missing := [step for step in steps if step not in there]:
        raise UserError(
            f"no checkpoint of step {missing[0]} in {shelf.directory}; there are {there}"
        )
    return sorted(set(steps))


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
