"""The page as text, and what captions from strangers can do to it: nothing."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from data.tars import png, write_tar
from PIL import Image

from clip_jax.data.check import check_source
from clip_jax.data.check_report import render_check_report, write_check_report
from clip_jax.data.sources.webdataset import WebdatasetSource
from clip_jax.data.tokenizers import Tokenizer

NASTY = "</script><b>bold</b> & \"quotes\" 'n' <img src=x onerror=alert(1)> {{title}} \U0001f389"
VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """Tags with their attributes, and texts; fails where tags do not nest."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(content)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the same one"], 300, lowercase=True)


@pytest.fixture(scope="module")
def checked(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("page")
    members = [("s0.png", png(0, 300)), ("s0.txt", NASTY.encode())]
    for number in range(1, 12):
        members += [(f"s{number}.png", png(min(number, 8))), (f"s{number}.txt", b"the same one")]
    members += [("<i>.png", b"no picture"), ("<i>.txt", b"x")]
    source = WebdatasetSource(str(write_tar(folder / "a.tar", members)), folder / "index")
    check = check_source("<u>", source, tokenizer, context_length=6, image_size=20)
    return check, source


@pytest.fixture(scope="module")
def page(checked) -> Page:
    check, source = checked
    return Page(render_check_report([check], {check.name: source}))


def test_what_it_says(page, checked):
    check, _ = checked
    text = " ".join(page.texts)
    assert "1 (7.7%) of the samples are bad (image 1)" in text
    assert "11 (91.7%) of the samples have the caption" in text
    assert NASTY in text
    assert "<u>" in text
    assert "Equal images: 4 samples" in text
    bars = [attributes for tag, attributes in page.tags if tag == "i"]
    words = check.words.bins(40)
    assert [bar["title"] for bar in bars].count(f"{words[0].low:g}: {words[0].num}") >= 1


def test_nothing_runs_and_nothing_is_loaded(page):
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base", "u", "svg"}
    [policy] = [a["content"] for tag, a in page.tags if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:", "#")), (tag, attributes)


def test_pictures_are_inside(page):
    urls = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(urls) > 12
    sizes = set()
    for url in urls:
        kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", url).groups()
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert picture.format == kind.upper()
        sizes.add(picture.size)
    assert sizes == {(16, 16), (160, 160)}  # made smaller, never larger


def test_it_is_written_whole(checked, tmp_path):
    check, source = checked
    path = tmp_path / "check.html"
    path.write_text("old")
    write_check_report(path, [check, check], {check.name: source})
    content = path.read_text()
    assert content.count("<section") == 2
    assert content.rstrip().endswith("</html>")
    assert [file.name for file in tmp_path.iterdir()] == ["check.html"]
    with pytest.raises(OSError, match="none"):
        write_check_report(tmp_path / "none" / "x.html", [check], {check.name: source})


def test_a_sample_that_has_gone(tokenizer, tmp_path):
    tar = write_tar(tmp_path / "g.tar", [("a.png", png(0)), ("a.txt", b"a cat")])
    source = WebdatasetSource(str(tar), tmp_path / "index", retries=0)
    check = check_source("g", source, tokenizer, context_length=6, image_size=20)
    tar.write_bytes(b"")
    assert "sample 0: " in " ".join(Page(render_check_report([check], {"g": source})).texts)
