"""The result of a check in words and figures: for the terminal, for the page and as JSON."""

from collections import Counter
from typing import Any

from clip_jax.data.check_result import SourceCheck
from clip_jax.data.distribution import Distribution
from clip_jax.data.duplicates import Groups

# Shares of samples or captions above which a finding is worth a line.
_CUT, _COPIES, _COMMON, _SUSPICIOUS, _ENLARGED = 0.01, 0.01, 0.01, 0.05, 0.05
_PADDING = 0.3  # of tokens
_ELONGATED = 3.0  # longer side / shorter side: a crop loses most of it

_MOST_SHARDS = 3  # that are named

Rows = list[tuple[str, str]]


def summary(check: SourceCheck) -> dict[str, Rows]:
    """Labels and figures under headings."""
    parts = {"Samples": _sample_rows(check)}
    if check.num_usable:
        parts |= {
            "Images": _image_rows(check),
            "Captions": _caption_rows(check),
            "Copies": [
                ("equal images", _groups(check.equal_images, check)),
                ("images that look alike", _groups(check.look_alikes, check)),
                ("equal first captions", _groups(check.equal_captions, check)),
            ],
        }
    return parts


def findings(check: SourceCheck) -> list[str]:
    """What stands out, a sentence each; what hurts a run most comes first."""
    if not check.num_usable:
        return [f"None of the {check.num_checked:,} samples that were checked can be used."]
    found = [f"A file is damaged or cut short: {line}." for line in check.damaged]
    del found[_MOST_SHARDS:]
    if check.num_skipped:
        found.append(
            f"Left out: {_number(check.num_skipped, 'sample')} without image or caption, beside "
            f"the {check.num_samples:,} that the source has."
        )
    num_bad, usable = check.num_bad.total(), check.num_usable
    if num_bad:
        shards = _number(len(check.bad_by_shard), "shard")
        found.append(
            f"{_of(num_bad, check.num_checked)} of the samples are bad ({_counts(check.num_bad)}), "
            f"in {shards}: a run replaces each by another one."
        )
    extra = check.equal_images.num_extra
    if extra > _COPIES * usable:
        found.append(f"{_of(extra, usable)} of the images are byte by byte copies of another.")
    if check.look_alikes.num_extra > _COPIES * usable:
        found.append(f"{_of(check.look_alikes.num_extra, usable)} of the images look like another.")
    for common in check.common_captions:
        if common.num_samples > max(1, _COMMON * usable):
            found.append(
                f"{_of(common.num_samples, usable)} of the samples have the caption "
                f"\u201c{shortened(common.text)}\u201d."
            )
    num_captions = len(check.tokens)
    for title, count in check.suspicious.most_common():
        if count > _SUSPICIOUS * num_captions:
            found.append(f"{_of(count, num_captions)} of the captions are suspicious: {title}.")
    if check.share_cut > _CUT:
        found.append(
            f"{_percent(check.share_cut)} of the captions have more than {check.context_length} "
            "tokens and are cut."
        )
    if check.share_padding > _PADDING:
        found.append(f"{_percent(check.share_padding)} of the text tower's tokens are padding.")
    small = check.shorter_sides.num_below(check.image_size)
    if small > _ENLARGED * usable:
        found.append(
            f"{_of(small, usable)} of the images have a side below {check.image_size} pixels and "
            "are enlarged."
        )
    return found


def table(check: SourceCheck) -> str:
    """All of it as text."""
    lines = [f"{check.name}: {check.num_checked:,} samples checked in {check.seconds:.1f} s", ""]
    for heading, rows in summary(check).items():
        lines += [heading, *(f"  {label:27} {figure}" for label, figure in rows), ""]
    for bad in check.bad_samples:
        lines.append(f"bad ({bad.reason}): {bad.name}: {bad.message}")
    if check.bad_samples:
        lines.append("")
    found = findings(check)
    lines += [f"- {finding}" for finding in found] or ["Nothing stands out."]
    return "\n".join(lines) + "\n"


def to_json(check: SourceCheck) -> dict[str, Any]:
    """The figures, for other programs."""
    result: dict[str, Any] = {}
    for name, value in vars(check).items():
        if isinstance(value, Distribution):
            value = value.summary()
        elif isinstance(value, Counter):
            value = dict(value.most_common())
        elif isinstance(value, Groups):
            value = {**value._asdict(), "largest": [group._asdict() for group in value.largest]}
        elif name in ("bad_samples", "common_captions"):
            value = [entry._asdict() for entry in value]
        elif name == "packing" and value is not None:
            value = value._asdict()
        elif name == "examples":
            value = {kind.title: kind.rows for kind in value}
        result[name] = value
    return {
        **result,
        "share_cut": check.share_cut,
        "share_padding": check.share_padding,
        "findings": findings(check),
    }


def shortened(text: str, most: int = 80) -> str:
    """One line of at most so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"


def _sample_rows(check: SourceCheck) -> Rows:
    sizes = check.shard_sizes
    several = f" of {sizes.smallest:,.0f} to {sizes.largest:,.0f} samples" if len(sizes) > 1 else ""
    rows = [
        ("in the source", f"{check.num_samples:,}"),
        ("shards", f"{len(sizes):,}{several}"),
        ("left out", f"{check.num_skipped:,} without image or caption"),
        ("damaged files", f"{len(check.damaged):,}"),
        ("checked", f"{check.num_checked:,}"),
        ("usable", _of(check.num_usable, check.num_checked)),
    ]
    if check.num_bad:
        rows.append(("bad", _counts(check.num_bad)))
        worst = ", ".join(
            f"{shard} ({count:,})" for shard, count in check.bad_by_shard.most_common(3)
        )
        rows.append(("most bad ones in", worst))
    return rows + [("holds", line) for line in check.schema]


def _image_rows(check: SourceCheck) -> Rows:
    usable, aspects = check.num_usable, check.aspects
    elongated = aspects.num_below(1 / _ELONGATED) + aspects.num_above(_ELONGATED)
    small = check.shorter_sides.num_below(check.image_size)
    return [
        ("formats", _counts(check.formats)),
        ("color modes", _counts(check.modes)),
        ("width", _spread(check.widths)),
        ("height", _spread(check.heights)),
        ("width / height", _spread(aspects, digits=2)),
        ("size, kB", _spread(check.num_bytes, digits=1, unit=1000)),
        (f"shorter side below {check.image_size}", _of(small, usable)),
        (f"longer than {_ELONGATED:g} : 1", _of(elongated, usable)),
    ]


def _caption_rows(check: SourceCheck) -> Rows:
    rows = [
        ("of an image", _spread(check.captions_per_image)),
        ("characters", _spread(check.characters)),
        ("words", _spread(check.words)),
        ("tokens", _spread(check.tokens)),
        (f"cut at {check.context_length} tokens", _percent(check.share_cut)),
        ("padding", f"{_percent(check.share_padding)} of the tokens, a caption to a row"),
    ]
    if check.packing is not None:
        group, needed = check.packing
        rows.append(
            ("packed", f"{group} captions in {needed} rows: {needed / group:.0%} of the rows")
        )
    total = len(check.tokens)
    return rows + [(title, _of(count, total)) for title, count in check.suspicious.most_common()]


def _spread(values: Distribution, digits: int = 0, unit: float = 1) -> str:
    numbers = (values.percentile(percent) for percent in (0, 5, 50, 95, 100))
    low, p5, median, p95, high = (f"{number / unit:,.{digits}f}" for number in numbers)
    if low == high:
        return low
    mean = f"{values.mean / unit:,.{max(digits, 1)}f}"
    return f"median {median}, mean {mean}, 90% from {p5} to {p95}, all from {low} to {high}"


def _groups(groups: Groups, check: SourceCheck) -> str:
    if not groups.num_groups:
        return "none"
    return f"{_of(groups.num_extra, check.num_usable)}, in {groups.num_groups:,} groups"


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _of(count: int, total: int) -> str:
    return f"{count:,} ({_percent(count / max(1, total))})"


def _percent(share: float) -> str:
    """With one digit after the point, and never 0% of something or 100% of less than all."""
    if 0 < share < 0.001:
        return "under 0.1%"
    if 0.999 < share < 1:
        return "over 99.9%"
    return f"{share:.1%}"
