"""A plan in words and figures: sections for the terminal and the page."""

import dataclasses
import textwrap

from clip_jax.planning.doctor_case import counted as number_of
from clip_jax.planning.doctor_case import size
from clip_jax.planning.estimate import Estimate, Range
from clip_jax.planning.findings import gib, room
from clip_jax.planning.memory import Memory
from clip_jax.planning.plan import Judged, Plan
from clip_jax.planning.plan_trials import counted
from clip_jax.planning.report_trials import Table, search_table, sweep_table
from clip_jax.planning.topology import Topology

_LABEL = 27  # characters of a label, as in `clip-jax data check`
_NARROWEST = 60
_BOUNDS = {
    "host": "transfers to and from the host",
    "overhead": "overhead: launches of kernels, latencies of collectives",
}

Rows = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report: labels with figures, then a table, then lines."""

    heading: str
    rows: Rows = dataclasses.field(default_factory=list)
    table: Table | None = None
    lines: tuple[str, ...] = ()


def title(plan: Plan) -> str:
    return f"{plan.config.name} on {plan.topology.name}"


def summary(plan: Plan) -> str:
    """One line: does it fit, and how long it takes."""
    needs, has = plan.asked.needed_bytes, plan.topology.usable_bytes
    of = "" if has is None else f" of {room(plan.topology)}"
    figures = "" if needs is None else f": {gib(needs)}{of} a device"
    if not plan.fits:
        return f"does not fit{figures}"
    verdict = "compiles" if has is None else "fits"
    assert plan.shown is not None
    estimate = plan.shown.estimate
    cost = "" if estimate.cost is None else f", cost {_number(estimate.cost.expected)}"
    return (
        f"{verdict}{figures}; {_number(estimate.samples_per_second.expected)} samples/s, "
        f"{_number(estimate.days.expected)} days, {_number(estimate.chip_hours.expected)} "
        f"chip-hours{cost} (estimates)"
    )


def sections(plan: Plan) -> list[Section]:
    """All of a plan but what was found, in the order in which it is read."""
    parts = [Section(heading="Run", rows=_run_rows(plan)), _memory(plan)]
    if plan.search is not None:
        lines = [f"{plan.search.num_compiled} compiled (limit {plan.search.limit}): "]
        lines[0] += counted(list(plan.search.attempts)) or "nothing else to try"
        if plan.shown is None:
            hint = " or a larger --max_compiles" if plan.search.num_left_out else ""
            lines.append(f"nothing that was tried fits: use more devices, a smaller batch{hint}")
        else:
            lines.append(f"fits with the least computed again: {' '.join(plan.shown.overrides)}")
        table = search_table(plan.search)
        parts.append(Section(heading="What fits", table=table, lines=tuple(lines)))
    if plan.shown is not None:
        if plan.shown.overrides:
            heading = f"Memory of a device, with {' '.join(plan.shown.overrides)}"
            rows = _memory_rows(plan.shown.step.memory, plan.topology)
            parts.append(Section(heading=heading, rows=rows))
        parts += _shown_sections(plan.shown)
    if plan.sweep is not None:
        sweep = plan.sweep
        line = f"{sweep.num_compiled} compiled (limit {sweep.limit}): "
        line += counted([point.attempt for point in sweep.points])
        best = "* no other needs less memory and is as fast"
        if sweep.num_left_out:
            best += (
                f", of those compiled: {sweep.num_left_out} of {len(sweep.points)} were not tried, "
                "and a larger --max_compiles tries them"
            )
        lines = [line, best]
        heading = f"Sweep of {', '.join(sweep.axes)}"
        parts.append(Section(heading=heading, table=sweep_table(sweep), lines=tuple(lines)))
    return parts


def text(plan: Plan, *, width: int) -> str:
    """The whole report for a terminal of so many columns."""
    width = max(width, _NARROWEST)
    lines = [*_wrapped("", f"{title(plan)}: {summary(plan)}", width, indent=2), ""]
    for section in sections(plan):
        lines.append(section.heading)
        for label, figure in section.rows:
            lines += _wrapped(f"  {label:{_LABEL}} ", figure, width)
        if section.table is not None:
            lines += [f"  {line}" for line in section.table.aligned()]
        for line in section.lines:
            lines += _wrapped("  ", line, width)
        lines.append("")
    for code, level, found in plan.findings:
        lines += _wrapped(f"{level:8}{code:24} ", found, width, indent=10)
    errors = sum(finding.level == "error" for finding in plan.findings)
    warnings = len(plan.findings) - errors
    lines.append(f"{number_of(errors, 'error')}, {number_of(warnings, 'warning')}")
    if stated := assumptions(plan):
        lines += ["", "Assumed"]
        for assumption in stated:
            lines += _wrapped("- ", assumption, width)
    return "\n".join(lines) + "\n"


def assumptions(plan: Plan) -> tuple[str, ...]:
    if plan.shown is None:
        return ()
    step, estimate = plan.shown.step, plan.shown.estimate
    return tuple(dict.fromkeys((*step.assumptions, *estimate.assumptions)))


def milliseconds(values: Range) -> str:
    return _range(Range(*(1e3 * value for value in values)), " ms")


def _run_rows(plan: Plan) -> Rows:
    topology, config = plan.topology, plan.config
    chip = "CPU" if topology.chip is None else topology.chip.name
    devices = f"{topology.num_devices:,} devices of {topology.num_chips:,} {chip}"
    if topology.num_chips == topology.num_devices:
        devices = f"{topology.num_chips:,} {chip}"
    several = [
        f"{number} {what}s"
        for number, what in ((topology.num_hosts, "host"), (topology.num_slices, "slice"))
        if number > 1
    ]
    setting = plan.asked.setting
    data, fsdp, tensor = setting.mesh
    batch = config.global_batch_size
    return [
        ("model", config.model.name),
        ("devices", ", ".join([devices, *several])),
        ("mesh", f"data {data}, fsdp {fsdp}, tensor {tensor}"),
        ("batch", f"{batch:,}: {batch // (data * fsdp):,} pairs a device"),
        ("microbatches", str(setting.microbatches)),
        ("remat", setting.remat),
        ("precision", config.precision),
    ]


def _memory(plan: Plan) -> Section:
    """Of the recipe; where the compiler gave up, what is known without it."""
    if plan.asked.step is not None:
        rows = _memory_rows(plan.asked.step.memory, plan.topology)
        return Section(heading="Memory of a device", rows=rows)
    needs = plan.asked.needed_bytes
    assert needs is not None
    parts = [
        ("parameters", plan.state.parameters),
        ("optimizer", plan.state.rest),
        ("all else", max(0, needs - plan.state.total)),
    ]
    return Section(heading="Memory of a device", rows=_part_rows(parts, needs, plan.topology))


def _memory_rows(memory: Memory, topology: Topology) -> Rows:
    parts = [
        ("parameters", memory.parameters),
        ("optimizer", memory.optimizer),
        ("statistics, averages", memory.model_state),
        ("batch", memory.batch),
        ("activations", memory.activations),
        ("temporaries", memory.temporaries),
        ("output", memory.output),
    ]
    rows = _part_rows(parts, memory.total, topology)
    if memory.attention_scores:
        scores = gib(memory.attention_scores)
        rows.append(("left out", f"{scores} of attention scores, which fused attention saves"))
    return rows


def _part_rows(parts: list[tuple[str, int]], total: int, topology: Topology) -> Rows:
    has = topology.usable_bytes
    of = "" if has is None else f" of {room(topology)}: {total / has:.0%}"
    return [
        *((label, f"{gib(value):>10} {value / total:5.0%}") for label, value in parts if value),
        ("all, at the peak", f"{gib(total):>10}{of}"),
    ]


def _shown_sections(shown: Judged) -> list[Section]:
    estimate, step = shown.estimate, shown.step
    counted_flops = step.least_flops * step.config.global_batch_size / step.num_devices
    changed = f", with {' '.join(shown.overrides)}" if shown.overrides else ""
    rows: Rows = [
        (
            "FLOPs",
            f"{_flops(estimate.flops)} a device: {estimate.flops / counted_flops:.3f} x the "
            "analytic count (3 x forward)",
        ),
        ("memory traffic", f"{size(estimate.memory_bytes)} a device"),
        ("sent", f"{size(sum(t.num_bytes for t in estimate.traffic))} a device"),
        ("computing, at the peak", f"{1e3 * estimate.compute_seconds:.4g} ms"),
        ("memory, at its bandwidth", f"{1e3 * estimate.memory_seconds:.4g} ms"),
        ("one operation after another", f"{1e3 * estimate.chip_seconds:.4g} ms"),
        ("sending", f"{1e3 * estimate.communication_seconds:.4g} ms"),
    ]
    if estimate.host_bytes:
        to_host = f"{size(estimate.host_bytes)}: {1e3 * estimate.host_seconds:.4g} ms"
        rows.append(("to and from the host", to_host))
    bound_by = _BOUNDS.get(estimate.bound_by, estimate.bound_by)
    rows.append(("step time", f"{milliseconds(estimate.step_seconds)}, bound by {bound_by}"))
    if estimate.mfu is not None:
        rows.append(("MFU", _percents(estimate.mfu)))
    compiled = f"{step.compile_seconds:.1f} s{', from the cache' if step.cached else ''}"
    rows.append(("compiled in", compiled))
    parts = [Section(heading=f"A step (estimates{changed})", rows=rows)]
    if estimate.traffic:
        parts.append(Section(heading="Sent by a device in a step", table=_traffic_table(estimate)))
    parts.append(Section(heading="The run (estimates)", rows=_cost_rows(shown)))
    return parts


def _traffic_table(estimate: Estimate) -> Table:
    ordered = sorted(estimate.traffic, key=lambda traffic: -traffic.seconds)
    return Table(
        header=("kind", "along", "link", "times", "sent", "ms", "hidden"),
        rows=tuple(
            (
                traffic.kind,
                "+".join(traffic.axes) or "-",
                traffic.link,
                f"{traffic.times:,}",
                size(traffic.num_bytes),
                f"{1e3 * traffic.seconds:.3f}",
                f"{traffic.asynchronous:.0%}",
            )
            for traffic in ordered
        ),
        left=3,
    )


def _cost_rows(shown: Judged) -> Rows:
    estimate, config = shown.estimate, shown.step.config
    samples = estimate.num_steps * config.global_batch_size
    rows: Rows = [
        ("samples a second", _range(estimate.samples_per_second)),
        ("steps", f"{estimate.num_steps:,}: {samples:,} samples"),
        ("days", _range(estimate.days)),
        ("chip-hours", _range(estimate.chip_hours)),
    ]
    if estimate.cost is not None:
        rows.append(("cost", _range(estimate.cost)))
    if (measured := estimate.measured) is not None:
        rows.append(
            (
                "measured",
                f"{measured.steps_per_second:.4g} steps/s in {measured.workdir}: the estimated "
                f"step takes {abs(measured.error):.1%} {'more' if measured.error > 0 else 'less'}",
            )
        )
    return rows


def _flops(count: float) -> str:
    """`12.3 T`."""
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g} {unit}".rstrip()
        count /= 1000
    return f"{count:,.3g} P"


def _range(values: Range, unit: str = "") -> str:
    low, high = sorted((values.low, values.high))
    return f"{_number(values.expected)}{unit} ({_number(low)} to {_number(high)})"


def _percents(values: Range) -> str:
    low, high = sorted((values.low, values.high))
    return f"{values.expected:.1%} ({low:.1%} to {high:.1%})"


def _number(value: float) -> str:
    """Three digits, and never a power of ten."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _wrapped(label: str, line: str, width: int, *, indent: int | None = None) -> list[str]:
    return textwrap.wrap(
        line,
        width,
        initial_indent=label,
        subsequent_indent=" " * (len(label) if indent is None else indent),
        break_long_words=False,
        break_on_hyphens=False,
    )
