"""The page of a plan: the report's sections, with pictures of the memory and of the sweep."""

from pathlib import Path

from clip_jax.data.page import escape, render_page, write_page
from clip_jax.planning.page_pictures import memory_bar, sweep_plot
from clip_jax.planning.plan import Plan
from clip_jax.planning.report import Section, assumptions, sections, summary, title
from clip_jax.planning.report_trials import Table

_FOOTER = (
    "Nothing ran: the step was compiled for hardware that need not be there. Times are estimates "
    "by a roofline; what they assume is above."
)


def write_plan_page(path: Path, plan: Plan) -> None:
    """Write the page, whole or not at all. Raises OSError where the folder cannot be written."""
    write_page(path, render_plan_page(plan))


def render_plan_page(plan: Plan) -> str:
    """The whole page as text; it loads nothing and runs no script."""
    parts = sections(plan)
    body = [_findings(plan)]
    for number, section in enumerate(parts):
        picture = ""
        if section.heading == "Memory of a device":
            picture = memory_bar(plan)
        elif section.heading.startswith("Sweep") and plan.sweep is not None:
            picture = sweep_plot(plan.sweep, plan.topology.usable_bytes)
        body.append(_section(number, section, picture))
    if stated := assumptions(plan):
        items = "".join(f"<li>{escape(line)}</li>" for line in stated)
        body.append(f'<section id="assumed"><h2>Assumed</h2><ul>{items}</ul></section>')
    return render_page(
        title=title(plan),
        summary=_sentence(summary(plan)),
        links="".join(
            f'<a href="#part-{number}">{escape(section.heading)}</a>'
            for number, section in enumerate(parts)
        ),
        body="".join(body),
        footer=_FOOTER,
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _findings(plan: Plan) -> str:
    found = "".join(
        f"<li><strong>{escape(level)}: {escape(code)}</strong> {escape(text)}</li>"
        for code, level, text in plan.findings
    )
    return (
        '<section id="findings"><h2>Findings</h2><ul class="findings">'
        f"{found or '<li>Nothing stands out.</li>'}</ul></section>"
    )


def _section(number: int, section: Section, picture: str) -> str:
    rows = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(figure)}</dd></div>"
        for label, figure in section.rows
    )
    lines = "".join(f"<p>{escape(line)}</p>" for line in section.lines)
    return (
        f'<section id="part-{number}"><h2>{escape(section.heading)}</h2>{picture}'
        f"{f'<dl>{rows}</dl>' if rows else ''}"
        f"{'' if section.table is None else _table(section.table)}{lines}</section>"
    )


def _table(table: Table) -> str:
    def row(cells: tuple[str, ...], tag: str) -> str:
        sides = ["left"] * table.left + ["right"] * (len(cells) - table.left)
        return "".join(
            f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in table.rows)
    head = row(table.header, "th")
    return (
        f'<div style="overflow-x:auto"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
