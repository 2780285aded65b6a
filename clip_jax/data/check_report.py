"""The page of `clip-jax data check`: figures, histograms and pictures in one HTML file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from clip_jax.data.check_result import Examples, SourceCheck
from clip_jax.data.check_summary import findings, shortened, summary
from clip_jax.data.decode import decode_image
from clip_jax.data.distribution import Distribution
from clip_jax.data.duplicates import Groups
from clip_jax.data.page import escape, render_page, thumbnail_url, write_page
from clip_jax.data.record import Source

_THUMB_SIDE = 160  # pixels of the longer side: shown at 104, sharp on dense screens
_MOST_BINS = 40
_BAR_WIDTH = 48  # pixels at most
_MOST_CHARACTERS = 240  # of a caption
_FOOTER = (
    "Bars hold equal ranges, the last one also the highest 1%; a red line is the side of the image "
    "tower's input or the context length. Two images look alike if at most 3 of 64 comparisons of "
    "brightness between neighboring places differ."
)


def write_check_report(
    path: Path, checks: Sequence[SourceCheck], sources: Mapping[str, Source]
) -> None:
    """Write the page, whole or not at all; pictures are read again. sources: by `check.name`.

    Raises OSError where the folder cannot be written.
    """
    write_page(path, render_check_report(checks, sources))


def render_check_report(checks: Sequence[SourceCheck], sources: Mapping[str, Source]) -> str:
    """The whole page as text."""
    checked = sum(check.num_checked for check in checks)
    numbered = list(enumerate(checks))
    return render_page(
        title="Data check",
        summary=f"{checked:,} samples were read, evenly spread over each source.",
        links="".join(
            f'<a href="#source-{number}">{escape(shortened(check.name, 40))}</a>'
            for number, check in numbered
        ),
        body="".join(
            _source_section(number, check, sources[check.name]) for number, check in numbered
        ),
        footer=_FOOTER,
    )


def _source_section(number: int, check: SourceCheck, source: Source) -> str:
    found = "".join(f"<li>{escape(finding)}</li>" for finding in findings(check))
    tables = "".join(
        f"<div><h3>{escape(heading)}</h3><dl>"
        + "".join(f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd></div>" for a, b in rows)
        + "</dl></div>"
        for heading, rows in summary(check).items()
    )
    return (
        f'<section id="source-{number}"><h2>{escape(check.name)}</h2>'
        f'<ul class="findings">{found or "<li>Nothing stands out.</li>"}</ul>'
        f'<div class="tables">{tables}</div>'
        f"{_histograms(check)}{_bad_samples(check)}{_pictures(check, source)}</section>"
    )


def _histograms(check: SourceCheck) -> str:
    charts = (
        ("Width, pixels", check.widths, check.image_size),
        ("Height, pixels", check.heights, check.image_size),
        ("Width / height", check.aspects, None),
        ("Bytes of an image", check.num_bytes, None),
        ("Words of a caption", check.words, None),
        ("Tokens of a caption", check.tokens, check.context_length),
    )
    filled = [_histogram(title, values, mark) for title, values, mark in charts if len(values)]
    return f'<div class="charts">{"".join(filled)}</div>' if filled else ""


def _histogram(title: str, values: Distribution, mark: float | None) -> str:
    """Bars of equal width; `mark` is where a line stands, if the bars reach it."""
    bins = values.bins(_MOST_BINS)
    highest = max(b.num for b in bins)
    bars = "".join(
        f'<i style="height:{100 * b.num / highest:.2f}%" '
        f'title="{_range(b.low, b.high)}: {b.num:,}"></i>'
        for b in bins
    )
    line = ""
    width = bins[0].high - bins[0].low + (bins[1].low - bins[0].high if len(bins) > 1 else 1)
    if mark is not None and bins[0].low < mark < bins[0].low + width * len(bins):
        left = 100 * (mark - bins[0].low) / (width * len(bins))
        line = f'<b style="left:{left:.2f}%" title="{mark:g}"></b>'
    ends = f"<span>{bins[0].low:,g}</span><span>{bins[-1].high:,g}</span>"
    return (
        f'<figure style="max-width:{_BAR_WIDTH * len(bins)}px">'
        f"<figcaption>{escape(title)}</figcaption>"
        f'<div class="bars">{bars}{line}</div><div class="ends">{ends}</div></figure>'
    )


def _range(low: float, high: float) -> str:
    return f"{low:,g}" if low == high else f"{low:,g} to {high:,g}"


def _bad_samples(check: SourceCheck) -> str:
    if not check.bad_samples:
        return ""
    rows = "".join(
        f"<tr><td>{escape(bad.reason)}</td><td>{escape(bad.name)}</td><td>{bad.row:,}</td>"
        f"<td>{escape(shortened(bad.message, _MOST_CHARACTERS))}</td></tr>"
        for bad in check.bad_samples
    )
    return (
        "<h3>Bad samples, the first of each reason</h3><table><thead><tr><th>Reason</th>"
        f"<th>Sample</th><th>Row</th><th>Message</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _pictures(check: SourceCheck, source: Source) -> str:
    strips = [_strip(examples, source) for examples in check.examples if examples.rows]
    groups: tuple[tuple[str, Groups], ...] = (
        ("Equal images", check.equal_images),
        ("Images that look alike", check.look_alikes),
        ("Equal first captions", check.equal_captions),
    )
    for title, found in groups:
        strips += [
            _strip(Examples(f"{title}: {group.size:,} samples", group.members), source)
            for group in found.largest
        ]
    return "".join(strips)


def _strip(examples: Examples, source: Source) -> str:
    cards = "".join(f"<li>{_card(source, row)}</li>" for row in examples.rows)
    return f'<h3>{escape(examples.title)}</h3><ul class="strip">{cards}</ul>'


def _card(source: Source, row: int) -> str:
    try:
        record = source[row]
        picture = decode_image(record.image)
    except (ValueError, OSError) as error:  # it was usable a moment ago: storage comes and goes
        return f"<p>sample {row:,}: {escape(error)}</p>"
    captions = " \u00b7 ".join(record.captions)
    return (
        f'<img src="{thumbnail_url(picture, _THUMB_SIDE)}" alt="">'
        f"<p>{escape(shortened(captions, _MOST_CHARACTERS))}</p>"
        f"<small>{escape(record.key)}, sample {row:,}</small>"
    )
