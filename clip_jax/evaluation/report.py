"""The report of a training run: one HTML file with its pictures, scores and curves inside.

`write_report(path, Report(...))` fills `report.html`, which lies beside this file. Python writes
everything that does not move, so that the page reads without JavaScript; the script adds search,
curves and the similarity matrix. The page loads nothing: a content security policy forbids it.

N gallery pictures (picture i belongs to caption i), S thumbnail side in pixels, K pictures kept for
each query, n pictures of the similarity matrix.
"""

import base64
import dataclasses
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from clip_jax.checkpoint import AnyPath, write_atomically

_TEMPLATE = Path(__file__).with_name("report.html")
_GUTTER = 2  # pixels of repeated edge round each thumbnail: a scaled sprite blends its neighbours
_MAX_LOSSLESS_BYTES = 2**20  # above it the atlas is WebP, quality 90, instead
_MAX_POINTS = 1000  # of a training curve; two on each pixel of the widest chart
_NUM_HEADLINES = 4  # large numbers in the header: one row of a desktop page


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one evaluation set: `value` and what guessing would give, both in [0, 1]."""

    set: str
    metric: str
    value: float
    chance: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gallery:
    """A set to search: thumbnails, their captions and the best pictures for each caption.

    images: uint8 [N, S, S, 3]. captions: N texts, caption i belongs to image i.
    top_images: int [N, K], row i the images nearest to caption i, best first (K = 8 by custom).
    top_scores: float [N, K], their cosines. featured: captions to show first.
    Raises ValueError where the shapes or indices disagree.
    """

    name: str
    description: str
    images: np.ndarray
    captions: Sequence[str]
    top_images: np.ndarray
    top_scores: np.ndarray
    featured: Sequence[int]

    def __post_init__(self) -> None:
        shape, num = self.images.shape, len(self.captions)
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[1:] != (shape[1],) * 2 + (3,):
            raise ValueError(f"images are {self.images.dtype} {shape}, not uint8 [N, S, S, 3]")
        if num == 0 or shape[0] != num or self.top_images.shape[:1] != (num,):
            raise ValueError(
                f"{shape[0]} images, {num} captions and {self.top_images.shape[:1]} rows of "
                "top_images: the three must agree and be at least 1"
            )
        if self.top_images.ndim != 2 or self.top_scores.shape != self.top_images.shape:
            raise ValueError(
                f"top_images {self.top_images.shape} and top_scores {self.top_scores.shape} "
                "are not one [N, K]"
            )
        _check_indices("top_images", self.top_images, num)
        _check_indices("featured", self.featured, num)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confusion:
    """A picture whose caption lost to another one.

    image, predicted_image: gallery indices of the picture and of the one that belongs to
    `predicted_caption`. true_score, predicted_score: cosines of `image` with the two captions.
    """

    image: int
    true_caption: str
    predicted_caption: str
    true_score: float
    predicted_score: float
    predicted_image: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Similarity:
    """Cosines of n pictures with n captions: images, gallery indices; matrix, float [n, n]."""

    images: Sequence[int]
    captions: Sequence[str]
    matrix: np.ndarray

    def __post_init__(self) -> None:
        num = len(self.images)
        if num == 0 or len(self.captions) != num or self.matrix.shape != (num, num):
            raise ValueError(
                f"{num} images and {len(self.captions)} captions need a matrix "
                f"({num}, {num}), not {self.matrix.shape}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a report tells; a part that is None or empty becomes one sentence on the page.

    run: facts by label. metrics: the parsed lines of `metrics.jsonl`; a training line has `step`
    and numbers, an evaluation line `step`, `eval/<set>/<metric>` and `eval/<set>/<metric>/chance`.
    config: nested. attribution: lines of credit, their URLs become links.
    """

    title: str
    summary: str
    run: Mapping[str, str | int | float]
    metrics: Sequence[Mapping[str, Any]]
    scores: Sequence[Score]
    gallery: Gallery | None
    confusions: Sequence[Confusion]
    similarity: Similarity | None
    config: Mapping[str, Any]
    environment: Mapping[str, str]
    attribution: Sequence[str]

    def __post_init__(self) -> None:
        if self.gallery is None:
            return
        num = len(self.gallery.captions)
        pictures = [index for c in self.confusions for index in (c.image, c.predicted_image)]
        _check_indices("images of confusions", pictures, num)
        _check_indices("similarity.images", self.similarity.images if self.similarity else [], num)


def write_report(path: AnyPath, report: Report) -> None:
    """Writes the page, whole or not at all. Raises OSError where the folder cannot be written."""
    # A lone surrogate in a caption has no UTF-8 form: "replace" writes "?".
    write_atomically(path, render_report(report).encode("utf-8", "replace").decode("utf-8"))


def render_report(report: Report) -> str:
    """The whole page as text."""
    template = _TEMPLATE.read_text(encoding="utf-8")
    gallery, similarity = report.gallery, report.similarity
    atlas_css, atlas = ("", None) if gallery is None else _atlas(gallery.images)
    curves = _curves(report.metrics)
    has_curves = bool(curves["train"]["series"]) or len(curves["eval"]["step"]) > 1
    data = {
        "gallery": gallery
        and {**_fields(gallery), "images": atlas, "top_scores": gallery.top_scores.round(4)},
        "curves": curves,
        "confusions": [_fields(confusion) for confusion in report.confusions],
        "similarity": similarity and {**_fields(similarity), "matrix": similarity.matrix.round(4)},
        "config": report.config,
    }
    # Only the scripts of the template may run, whatever a caption manages to put on the page.
    scripts = re.findall(r"<script>(.*?)</script>", template, flags=re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    parts = {
        "script_hashes": " ".join(f"'sha256-{h}'" for h in hashes),
        "atlas_css": atlas_css,
        "title": _text(report.title),
        "summary": _text(report.summary),
        "headline": _headline(report.scores),
        "facts": _pairs(report.run, "facts", "No facts of the run were recorded."),
        "gallery": _slot("gallery", gallery, "No set of pictures was embedded for this report."),
        "curves": _slot("curves", has_curves, "No training metrics were recorded."),
        "scores": _score_tables(report.scores) or _missing("No evaluation was run."),
        "confusions": _slot("confusions", report.confusions, "No confusions were recorded."),
        "similarity": _slot("similarity", similarity, "No similarity matrix was computed."),
        "config": _slot("config", report.config, "No configuration was recorded."),
        "environment": _pairs(report.environment, "environment", "No environment was recorded."),
        "attribution": "".join(f"<p>{_links(line)}</p>" for line in report.attribution)
        or _missing("No attribution was given."),
        "data": _json(data),
    }
    # One pass, so that a placeholder inside a caption stays text.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _atlas(images: np.ndarray) -> tuple[str, dict[str, int]]:
    """Lays uint8 [N, S, S, 3] out on a nearly square grid, as the smallest of PNG and WebP.

    Returns the CSS rule that carries the picture, and what places thumbnail i in it, in pixels.
    """
    from PIL import Image

    num, size = images.shape[:2]
    stride, columns = size + 2 * _GUTTER, math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    if columns * stride > 16383:  # WebP's limit of either side
        raise ValueError(f"{num} thumbnails of {size} px need over 16383 px a side: show fewer")
    grid = np.full((rows * columns, stride, stride, 3), 255, np.uint8)
    edges = ((0, 0), (_GUTTER, _GUTTER), (_GUTTER, _GUTTER), (0, 0))
    grid[:num] = np.pad(images, edges, mode="edge")
    pixels = grid.reshape(rows, columns, stride, stride, 3).swapaxes(1, 2)
    picture = Image.fromarray(pixels.reshape(rows * stride, columns * stride, 3))

    def encode(kind: str, **options: Any) -> tuple[str, bytes]:
        picture.save(buffer := io.BytesIO(), kind, **options)
        return kind, buffer.getvalue()

    encoded = [encode("webp", lossless=True, method=4), encode("png", optimize=True)]
    if min(len(content) for _, content in encoded) > _MAX_LOSSLESS_BYTES:
        encoded.append(encode("webp", quality=90, method=4))
    kind, content = min(encoded, key=lambda pair: len(pair[1]))
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    # In percent of a thumbnail's box, so that the sprite fits a box of any size.
    scale = f"{100 * columns * stride / size:.4f}% {100 * rows * stride / size:.4f}%"
    layout = {"size": size, "stride": stride, "gutter": _GUTTER, "columns": columns, "rows": rows}
    return f".thumb {{ background-image: url({url}); background-size: {scale}; }}", layout


def _curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sorts the lines of a run into columns of numbers, None where one is missing or not finite."""
    train: dict[float, dict[str, float]] = {}
    evals: dict[float, dict[str, float]] = {}
    for line in lines:
        step = line.get("step")
        if not _is_number(step) or not math.isfinite(step):
            continue
        # A resumed run repeats the steps after its checkpoint: the later line holds.
        for key, value in line.items():
            if _is_number(value) and key != "step":
                (evals if key.startswith("eval/") else train).setdefault(step, {})[key] = value
    samples = {s: n["samples_seen"] for s, n in sorted(train.items()) if "samples_seen" in n}
    return {"train": _columns(train, samples), "eval": _columns(evals, samples)}


def _columns(rows: dict[float, dict[str, float]], samples: dict[float, float]) -> dict[str, Any]:
    """Columns of at most `_MAX_POINTS` points, each the mean of `merged` neighbouring rows."""
    steps = sorted(step for step, row in rows.items() if row.keys() != {"samples_seen"})
    merged = max(1, math.ceil(len(steps) / _MAX_POINTS))
    starts = range(0, len(steps), merged)

    def means(values: Sequence[Any]) -> list[float | None]:
        groups = (values[i : i + merged] for i in starts)
        finite = ([v for v in g if v is not None and math.isfinite(v)] for g in groups)
        return [float(f"{sum(g) / len(g):.6g}") if g else None for g in finite]

    keys = dict.fromkeys(key for step in steps for key in rows[step] if key != "samples_seen")
    series = {key: means([rows[step].get(key) for step in steps]) for key in keys}
    num_bad = {k: sum(not math.isfinite(r.get(k, 0)) for r in rows.values()) for k in keys}
    seen = np.interp(steps, list(samples), list(samples.values())) if samples else None
    return {
        "step": [round(float(np.mean(steps[i : i + merged]))) for i in starts],
        "samples": [None if seen is None else round(seen[i : i + merged].mean()) for i in starts],
        "series": {key: values for key, values in series.items() if set(values) != {None}},
        "not_finite": {key: num for key, num in num_bad.items() if num},
        "merged": merged,
    }


def _headline(scores: Sequence[Score]) -> str:
    first = [s for s in scores if s.metric.endswith("R@1") or s.metric.endswith("top1")]
    return "".join(
        f'<li class="score"><span class="score-name">{_text(_metric_name(s.metric))}</span>'
        f'<span class="score-value">{_percent(s.value)}</span>'
        f'<span class="score-chance"><b>{_ratio(s)}</b> chance ({_percent(s.chance)})</span>'
        f'<span class="score-set">{_text(_words(s.set))}</span></li>'
        for s in (first or scores)[:_NUM_HEADLINES]
    )


def _score_tables(scores: Sequence[Score]) -> str:
    """One table for each set; the bar runs from 0 to 1 with a tick at chance."""

    def table(name: str) -> str:
        rows = "".join(
            f'<tr><th scope="row">{_text(_metric_name(s.metric))}'
            f'<span class="bar" aria-hidden="true"><i style="width:{_width(s.value)}%"></i>'
            f'<b style="left:{_width(s.chance)}%"></b></span></th>'
            f"<td>{_percent(s.value)}</td><td>{_percent(s.chance)}</td><td>{_ratio(s)}</td></tr>"
            for s in scores
            if s.set == name
        )
        return (
            f'<table class="scores"><caption>{_text(_words(name))}</caption><thead><tr>'
            '<th scope="col">Metric</th><th scope="col">Score</th><th scope="col">Chance</th>'
            f'<th scope="col">&times; chance</th></tr></thead><tbody>{rows}</tbody></table>'
        )

    return "".join(table(name) for name in dict.fromkeys(s.set for s in scores))


def _pairs(values: Mapping[str, Any], kind: str, sentence: str) -> str:
    rows = "".join(
        f"<div><dt>{_text(_words(key))}</dt><dd>{_text(_number(value))}</dd></div>"
        for key, value in values.items()
    )
    return f'<dl class="{kind}">{rows}</dl>' if rows else _missing(sentence)


def _links(line: str) -> str:
    """Escaped text with its URLs as links; punctuation after a URL is not part of it."""
    pieces = re.split(r"(https?://[^\s<>\"']*[^\s<>\"'.,;:!?)\]])", line)
    return "".join(
        f'<a href="{_text(piece)}" rel="noopener">{_text(piece)}</a>' if i % 2 else _text(piece)
        for i, piece in enumerate(pieces)
    )


def _slot(name: str, value: object, sentence: str) -> str:
    """An empty box that the script fills, or the sentence where there is nothing to show."""
    return f'<div id="{name}"></div>' if value else _missing(sentence)


def _missing(sentence: str) -> str:
    return f'<p class="missing">{_text(sentence)}</p>'


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _metric_name(metric: str) -> str:
    """`text_to_image_R@1` -> `Text → image R@1`."""
    name = _words(metric.replace("_to_", " → ")).replace("zero shot", "zero-shot")
    name = re.sub(r"\btop(\d)", "top\u00a0\\1", re.sub(r"(\d)way\b", r"\1-way", name))
    return name[:1].upper() + name[1:]


def _number(value: object) -> str:
    if not _is_number(value):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def _percent(value: float) -> str:
    if not math.isfinite(value):
        return "&ndash;"
    percent = 100 * value
    return f"{percent:.2g}%" if 0 < percent < 1 else f"{percent:.1f}%"


def _ratio(score: Score) -> str:
    """How many times chance; a dash where chance is 0 or a number is not finite."""
    ratio = score.value / score.chance if score.chance > 0 else math.nan
    if not math.isfinite(ratio):
        return "&ndash;"
    return f"{ratio:,.0f}&times;" if ratio >= 10 else f"{ratio:.1f}&times;"


def _width(value: float) -> str:
    return f"{100 * min(max(value, 0.0), 1.0):.2f}" if math.isfinite(value) else "0"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _fields(instance: Any) -> dict[str, Any]:
    return {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}


def _check_indices(name: str, indices: Any, num: int) -> None:
    array = np.asarray(indices)
    if array.size and (array.min() < 0 or array.max() >= num):
        raise ValueError(f"{name}: {array.min()}..{array.max()}, but the gallery has {num} images")


def _json(value: object) -> str:
    """JSON that is valid (no NaN) and stays inside its <script> whatever the text holds."""
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028"}
    return re.sub("[<>&\u2028]", lambda match: escapes[match[0]], text)


def _plain(value: Any) -> Any:
    """Lists, dicts, text and numbers; None for a number that is not finite."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)
