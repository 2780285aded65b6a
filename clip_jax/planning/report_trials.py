"""The tables of a search and of a sweep."""

import dataclasses

from clip_jax.planning.findings import gib
from clip_jax.planning.plan_setting import Attempt
from clip_jax.planning.search import Search
from clip_jax.planning.sweep import Point, Sweep, recomputed_share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as text. left: so many columns are flush left; numbers are flush right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int

    def aligned(self) -> list[str]:
        """Lines of plain text."""
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return [
            "  ".join(
                cell.ljust(width) if i < self.left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]


def search_table(search: Search) -> Table:
    """What was compiled; the rest is counted beside the table."""
    tried = [a for a in search.attempts if a.verdict in ("fits", "too large", "failed")]
    return Table(
        header=("mesh", "remat", "verdict", "microbatches", "needs", "computed again"),
        rows=tuple(
            (
                *_setting(attempt),
                str(attempt.setting.microbatches),
                needs(attempt),
                "-" if attempt.step is None else f"{recomputed_share(attempt.step):.1%}",
            )
            for attempt in tried
        ),
        left=3,
    )


def sweep_table(sweep: Sweep) -> Table:
    """What fits by speed, then what was compiled in vain; the rest is counted beside the table."""
    shown = [point for point in sweep.points if point.attempt.verdict in _SHOWN]
    header = ("mesh", "remat", "verdict", "microbatches", "needs", "ms", "samples/s", "again", "")
    return Table(header=header, rows=tuple(map(_sweep_row, shown)), left=3)


_SHOWN = ("fits", "too large", "failed")


def _sweep_row(point: Point) -> tuple[str, ...]:
    attempt = point.attempt
    start = (*_setting(attempt), str(attempt.setting.microbatches), needs(attempt))
    if point.step_seconds is None or point.samples_per_second is None or point.recomputed is None:
        return (*start, "-", "-", "-", "")
    return (
        *start,
        f"{1e3 * point.step_seconds.expected:.4g}",
        f"{point.samples_per_second:,.0f}",
        f"{point.recomputed:.1%}",
        "*" if point.on_frontier else "",
    )


def _setting(attempt: Attempt) -> tuple[str, str, str]:
    setting = attempt.setting
    verdict: str = attempt.verdict
    if attempt.verdict == "failed":
        verdict = f"failed: {attempt.reason[:60]}"
    return "x".join(map(str, setting.mesh)), setting.remat, verdict


def needs(attempt: Attempt) -> str:
    if attempt.needed_bytes is None:
        return "-"
    return f"{'>' if attempt.verdict == 'ruled out' else ''}{gib(attempt.needed_bytes)}"
