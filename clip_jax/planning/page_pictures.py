"""Pictures of a plan as SVG: what the memory holds, and the sweep's points with their frontier.

Colors are the page's own (`data/page.html`), which has a light and a dark form of each.
"""

import math
from collections.abc import Sequence

from clip_jax.data.page import escape
from clip_jax.planning.findings import gib
from clip_jax.planning.plan import Plan
from clip_jax.planning.sweep import Point, Sweep

_WIDTH, _HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 20, 16, 48  # margins, for labels
_TICKS = 5
_GIB = 2**30
# Parts of the memory, by the share of the accent in their color.
_SHADES = (100, 82, 66, 52, 38, 26, 16)


def memory_bar(plan: Plan) -> str:
    """A bar as wide as the device, or as what is needed where that is more."""
    step, has = plan.asked.step, plan.topology.usable_bytes
    needs = plan.asked.needed_bytes
    if needs is None:
        return ""
    if step is None:
        state = plan.state
        parts = [("parameters", state.parameters), ("optimizer", state.rest)]
        parts.append(("all else", max(0, needs - state.total)))
    else:
        memory = step.memory
        names = ("parameters", "optimizer", "model_state", "batch", "activations", "temporaries")
        parts = [(name.replace("_", " "), getattr(memory, name)) for name in names]
        parts.append(("output", memory.output))
    widest = max(needs, has or 0, sum(value for _, value in parts))
    x, bars = 0.0, []
    for (name, value), shade in zip(parts, _SHADES, strict=False):
        width = _WIDTH * value / widest
        color = f"color-mix(in srgb, var(--accent) {shade}%, var(--sunken))"
        bars.append(
            f'<rect x="{x:.1f}" y="0" width="{width:.1f}" height="40" style="fill:{color}">'
            f"<title>{escape(name)}: {gib(value)}</title></rect>"
        )
        x += width
    line = ""
    if has is not None:
        at = min(_WIDTH * has / widest, _WIDTH - 1)
        line = _line(at, 0, at, 40, "var(--alert)") + f"<title>{gib(has)}</title>"
    return _svg(_WIDTH, 40, f"{''.join(bars)}{line}", "Memory of a device by its parts")


def sweep_plot(sweep: Sweep, has: int | None) -> str:
    """Memory (across) against speed (up); the frontier is joined, a red line is the device."""
    points = [p for p in sweep.points if p.samples_per_second is not None]
    if not points:
        return "<p>No point fits.</p>"
    most_memory = max(float(has or 0), *(_memory(p) for p in points)) * 1.04
    most_speed = max(_speed(p) for p in points) * 1.08
    x_ticks, y_ticks = _ticks(most_memory / _GIB), _ticks(most_speed)

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * value / most_memory

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / most_speed

    parts = [_label(x(tick * _GIB), _HEIGHT - _BOTTOM + 18, f"{tick:g}") for tick in x_ticks]
    for tick in y_ticks:
        parts.append(_line(_LEFT, y(tick), _WIDTH - _RIGHT, y(tick), "var(--rule)"))
        parts.append(_label(_LEFT - 8, y(tick) + 4, f"{tick:,g}", anchor="end"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(_label(middle, _HEIGHT - 8, "memory of a device, GiB"))
    parts.append(_label(_LEFT, 11, "samples/s, expected", anchor="start"))
    if has is not None:
        parts.append(_line(x(has), _TOP, x(has), _HEIGHT - _BOTTOM, "var(--alert)"))
    best = sorted((p for p in points if p.on_frontier), key=_memory)
    corners = " ".join(f"{x(_memory(p)):.1f},{y(_speed(p)):.1f}" for p in best)
    parts.append(f'<polyline points="{corners}" style="fill:none;stroke:var(--accent)"/>')
    for point in points:
        fill = "var(--accent)" if point.on_frontier else "var(--paper)"
        told = f"{point.attempt.setting}: {gib(_memory(point))}, {_speed(point):,.0f} samples/s"
        parts.append(
            f'<circle cx="{x(_memory(point)):.1f}" cy="{y(_speed(point)):.1f}" r="4" '
            f'style="fill:{fill};stroke:var(--accent)"><title>{escape(told)}</title></circle>'
        )
    return _svg(_WIDTH, _HEIGHT, "".join(parts), "Samples per second against memory")


def _memory(point: Point) -> float:
    return float(point.attempt.needed_bytes or 0)


def _speed(point: Point) -> float:
    return float(point.samples_per_second or 0.0)


def _ticks(most: float) -> Sequence[float]:
    """At most so many round numbers from 0 up to `most`."""
    if most <= 0:
        return (0.0,)
    raw = most / _TICKS
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
    return tuple(step * i for i in range(int(most / step) + 1))


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" style="stroke:{color}"/>'


def _label(x: float, y: float, text: str, *, anchor: str = "middle") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="12" '
        f'style="fill:var(--soft)">{escape(text)}</text>'
    )


def _svg(width: int, height: int, content: str, name: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}" '
        f'style="width:100%;max-width:{width}px;margin-bottom:20px">{content}</svg>'
    )
