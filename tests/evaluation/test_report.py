"""The report as text: what it holds and what it must never hold."""

import base64
import dataclasses
import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from report_demo import demo_report

from clip_jax.evaluation import report

NASTY = "</script><b>bold</b> & \"quotes\" 'n' <img src=x onerror=alert(1)> 🎉 {{title}}"


class Page(HTMLParser):
    """The tags, attributes and texts of a page, as a browser would see them."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.data = ""
        self._open = ""
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = dict(attrs).get("id", "") or tag

    def handle_data(self, data):
        if self._open == "data":
            self.data += data
        elif self._open not in ("script", "style"):
            self.texts.append(data)

    def handle_endtag(self, tag):
        self._open = ""


@pytest.fixture(scope="module")
def demo() -> report.Report:
    return demo_report(num=120)


@pytest.fixture(scope="module")
def content(demo) -> str:
    return report.render_report(demo)


def _reject(token: str) -> None:
    raise AssertionError(f"{token} is not JSON")


def _data(content: str) -> dict:
    return json.loads(Page(content).data, parse_constant=_reject)


def test_loads_nothing_from_outside(content):
    page = Page(content)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name) or ""
            outside = re.match(r"\s*(https?:)?//", value)
            assert not outside or tag == "a", (tag, attributes)
            assert not value.startswith("javascript:"), (tag, attributes)
    assert not re.search(r"url\((?!data:)|@import", content)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert policy.count("'sha256-") == 2
    assert "{{" not in policy


def test_only_links_of_the_attribution_leave_the_page(content):
    links = [a["href"] for t, a in Page(content).tags if t == "a" and "://" in (a["href"] or "")]
    assert links == [
        "https://creativecommons.org/licenses/by/4.0/",
        "https://cldr.unicode.org",
    ]


def test_every_text_is_escaped(demo):
    content = report.render_report(
        dataclasses.replace(
            demo,
            title=NASTY,
            summary=NASTY,
            run={NASTY: NASTY},
            scores=[report.Score(set=NASTY, metric=NASTY, value=0.5, chance=0.1)],
            config={NASTY: {NASTY: [NASTY]}},
            environment={NASTY: NASTY},
            attribution=[NASTY, 'https://a.example/"onmouseover="alert(1)'],
        )
    )
    page, plain = Page(content), Page(report.render_report(demo))
    assert "img" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    assert [t for t, _ in page.tags].count("script") == [t for t, _ in plain.tags].count("script")
    # All are shown: title (twice), summary, fact (twice), set and metric in the header and in the
    # table, environment (twice), attribution; the placeholder in them was not filled in.
    assert sum("{{title}}" in text for text in page.texts) == 12
    data = _data(content)
    assert data["config"] == {NASTY: {NASTY: [NASTY]}}
    assert data["gallery"]["captions"][0] == NASTY


def test_numbers_that_are_not_finite_stay_out_of_the_json(demo):
    nan, inf = float("nan"), float("inf")
    content = report.render_report(
        dataclasses.replace(
            demo,
            run={"loss": nan, "speed": np.float32(inf)},
            metrics=[
                {"step": 1, "loss": nan, "samples_seen": 8},
                {"step": 2, "loss": 1.5, "gradient_norm": inf, "samples_seen": 16},
                {"step": nan, "loss": 3.0},
                {"loss": 3.0},
            ],
            scores=[report.Score(set="a", metric="R@1", value=nan, chance=0.0)],
            similarity=dataclasses.replace(demo.similarity, matrix=np.full((24, 24), np.nan)),
            config={"weight": nan, "size": np.int64(3)},
        )
    )
    data = _data(content)
    train = data["curves"]["train"]
    assert train["step"] == [1, 2]
    assert train["samples"] == [8, 16]
    assert train["series"] == {"loss": [None, 1.5]}
    assert train["not_finite"] == {"loss": 1, "gradient_norm": 1}
    assert data["config"] == {"weight": None, "size": 3}
    assert data["similarity"]["matrix"][0][0] is None
    assert not any(re.search(r"\bnan\b", text) for text in Page(content).texts)


def test_scores_are_in_the_page_without_a_script(content):
    texts = [text.strip() for text in Page(content).texts]
    assert "55.4%" in texts
    assert "803\u00d7" in texts
    assert texts.count("Zero-shot 100-way top\u00a01") == 3  # the header and two tables
    assert "69.0%" in texts
    assert "1.0%" in texts
    assert {"unseen artist", "seen artist", "28,714,753", "812.4"} <= set(texts)


def test_headlines_are_first_ranks(demo):
    scores = [report.Score(set="s", metric=f"R@{k}", value=k / 20, chance=0.01) for k in (10, 5, 1)]
    content = report.render_report(dataclasses.replace(demo, scores=scores))
    assert re.findall(r'score-value">([^<]*)<', content) == ["5.0%"]
    content = report.render_report(dataclasses.replace(demo, scores=scores[:2]))
    assert re.findall(r'score-value">([^<]*)<', content) == ["50.0%", "25.0%"]


def test_a_report_without_parts_says_so():
    content = report.render_report(
        report.Report(
            title="Empty",
            summary="",
            run={},
            metrics=[],
            scores=[],
            gallery=None,
            confusions=[],
            similarity=None,
            config={},
            environment={},
            attribution=[],
        )
    )
    sentences = [a for _, a in Page(content).tags if a.get("class") == "missing"]
    assert len(sentences) == 9 + 1  # each section, and the <noscript> of the header
    assert "{{" not in content


def test_a_resumed_run_keeps_the_later_lines(demo):
    metrics = [
        {"step": 10, "loss": 3.0, "samples_seen": 100},
        {"step": 20, "loss": 2.0, "samples_seen": 200},
        {"step": 30, "loss": 9.0, "samples_seen": 300},
        {"step": 25, "eval/set/R@1": 0.5, "eval/set/R@1/chance": 0.1},
        {"step": 30, "loss": 1.0, "samples_seen": 300},
    ]
    curves = _data(report.render_report(dataclasses.replace(demo, metrics=metrics)))["curves"]
    assert curves["train"]["series"]["loss"] == [3.0, 2.0, 1.0]
    assert curves["eval"]["step"] == [25]
    assert curves["eval"]["samples"] == [250]
    assert curves["eval"]["series"] == {"eval/set/R@1": [0.5], "eval/set/R@1/chance": [0.1]}


def test_a_long_run_is_averaged(demo):
    metrics = [{"step": step, "loss": float(step % 2)} for step in range(1, 50_001)]
    train = _data(report.render_report(dataclasses.replace(demo, metrics=metrics)))["curves"][
        "train"
    ]
    assert len(train["step"]) <= 1000
    assert train["merged"] == 50
    assert set(train["series"]["loss"]) == {0.5}
    assert train["step"][-1] > 49_900


def test_the_atlas_holds_every_picture(demo):
    content = report.render_report(demo)
    encoded = re.search(r"url\(data:image/\w+;base64,([^)]*)\)", content)[1]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
    place = _data(content)["gallery"]["images"]
    for i in (0, 7, 119):
        row, column = divmod(i, place["columns"])
        y, x = (cell * place["stride"] + place["gutter"] for cell in (row, column))
        shown = pixels[y : y + place["size"], x : x + place["size"]]
        np.testing.assert_array_equal(shown, demo.gallery.images[i])  # lossless: 120 are small


def test_large_galleries_stay_small():
    """1,450 pictures of 48 px, the size that the emoji experiment shows, in under 3 MB."""
    content = report.render_report(demo_report(num=1450))
    assert len(content.encode()) < 3e6
    assert len(_data(content)["gallery"]["captions"]) > 1000


def test_writes_whole_or_not_at_all(demo, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    report.write_report(path, demo)
    before = path.read_bytes()
    assert before.decode() == report.render_report(demo)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        report.write_report(path, dataclasses.replace(demo, title="Second"))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        report.write_report(tmp_path / "missing" / "report.html", demo)


def test_a_caption_without_utf8_form_is_written(demo, tmp_path):
    report.write_report(tmp_path / "r.html", dataclasses.replace(demo, title="half \ud83d"))
    assert "half ?" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("images", np.zeros((120, 8, 9, 3), np.uint8), r"not uint8 \[N, S, S, 3\]"),
        ("images", np.zeros((120, 8, 8, 3), np.float32), "float32"),
        ("captions", ["one"], "120 images, 1 captions"),
        ("top_images", np.full((120, 8), 120), "120..120, but the gallery has 120"),
        ("top_scores", np.zeros((120, 3)), r"\(120, 8\) and top_scores \(120, 3\)"),
        ("featured", [-1], "featured: -1..-1"),
    ],
)
def test_a_gallery_that_disagrees_with_itself_is_refused(demo, field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(demo.gallery, **{field: value})


def test_indices_outside_of_the_gallery_are_refused(demo):
    outside = dataclasses.replace(demo.confusions[0], predicted_image=120)
    with pytest.raises(ValueError, match="confusions"):
        dataclasses.replace(demo, confusions=[outside])
    outside = dataclasses.replace(demo.similarity, images=[120] * 24)
    with pytest.raises(ValueError, match=r"similarity\.images"):
        dataclasses.replace(demo, similarity=outside)
    with pytest.raises(ValueError, match="24 images"):
        dataclasses.replace(demo.similarity, matrix=np.zeros((24, 23)))


def test_ratio_to_chance():
    def ratio(value: float, chance: float) -> str:
        return report._ratio(report.Score(set="s", metric="m", value=value, chance=chance))

    assert ratio(0.5, 0.001) == "500&times;"
    assert ratio(0.03, 0.02) == "1.5&times;"
    assert ratio(0.5, 0.0) == ratio(math.nan, 0.1) == ratio(0.5, math.nan) == "&ndash;"
