import csv
import json

import fsspec
import numpy as np
import pytest
from data.source_checks import check_source
from data.tars import png
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError
from clip_jax.data.sources.table import TableSource

CAPTIONS = [
    "a cat",
    'with "quotes", commas',
    "größe \U0001f600",
    "two\nlines",
    " blanks ",
    "tab\tbed",
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(len(CAPTIONS)):
        (tmp_path / "images" / f"{number} ü.png").write_bytes(png(number))
    return tmp_path


def write_csv(path, header, rows, **dialect):
    with path.open("w", newline="", encoding=dialect.pop("encoding", "utf-8")) as stream:
        csv.writer(stream, **dialect).writerows([header, *rows])
    return str(path)


def rows():
    return [[f"images/{n} ü.png", caption] for n, caption in enumerate(CAPTIONS)]


EXPECTED = [(png(n), (caption.strip(),)) for n, caption in enumerate(CAPTIONS)]


@pytest.mark.parametrize(
    ("header", "dialect"),
    [
        (["filepath", "title"], {"delimiter": "\t"}),  # open_clip's
        (["image_path", "caption"], {}),
        (["path", "text"], {"lineterminator": "\n", "quoting": csv.QUOTE_ALL}),
        (["file_name", "caption"], {"encoding": "utf-8-sig", "lineterminator": "\n"}),
    ],
)
def test_csv(folder, header, dialect):
    path = write_csv(folder / "a.csv", header, rows(), **dialect)
    source = TableSource(path, folder / "index")
    check_source(source, EXPECTED)
    assert source.locate(2) == f"{path}, row 2"


def test_reads_what_open_clip_reads(folder):
    """Its CsvDataset is `pandas.read_csv(path, sep='\\t')` with `filepath` and `title`."""
    pandas = pytest.importorskip("pandas")
    path = write_csv(folder / "a.csv", ["filepath", "title"], rows(), delimiter="\t")
    frame = pandas.read_csv(path, sep="\t")
    source = TableSource(path, folder / "index")
    assert [source.captions(index)[0] for index in range(len(source))] == [
        title.strip() for title in frame["title"].tolist()
    ]


def test_jsonl(folder):
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows()]
    (folder / "metadata.jsonl").write_text("\n".join(lines[:4]) + "\n\n" + "\n".join(lines[4:]))
    check_source(TableSource(str(folder / "metadata.jsonl"), folder / "index"), EXPECTED)


def test_several_files_and_other_columns(folder):
    write_csv(folder / "1.csv", ["x", "caption", "filepath"], [["", c, p] for p, c in rows()[:2]])
    write_csv(folder / "2.tsv", ["filepath", "caption"], rows()[2:], delimiter="\t")
    source = TableSource(f"{folder}/1.csv,{folder}/*.tsv", folder / "index")
    check_source(source, EXPECTED)
    assert source.shard(2) == f"{folder}/2.tsv"


def test_captions_of_several_columns(folder):
    row = {"image": "images/0 ü.png", "alt": "a", "made": {"long": ["b", "c"]}, "none": None}
    (folder / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"alt": ""}))
    source = TableSource(
        str(folder / "a.jsonl"),
        folder / "index",
        caption_keys=("alt", "made.long"),
        caption_weights=(1, 3),
    )
    assert source[0].captions == ("a", "b", "c")
    assert source[0].weights == pytest.approx((0.25, 0.375, 0.375))
    assert source[1].weights == pytest.approx((0.5, 0.5))
    path = write_csv(folder / "a.csv", ["image", "alt", "long"], [["images/0 ü.png", "a", "b"]])
    source = TableSource(path, folder / "index", caption_keys=("long", "alt"))
    assert (source[0].captions, source[0].weights) == (("b", "a"), ())


def test_remote(tmp_path):
    store = fsspec.filesystem("memory")
    store.pipe("/set/a.csv", b"filepath,caption\nx/0.png,one\nmemory://other/1.png,two\n")
    store.pipe("/set/x/0.png", b"zero")
    store.pipe("/other/1.png", b"one")
    source = TableSource("memory://set/a.csv", tmp_path / "index")
    assert [source[index][:2] for index in range(2)] == [(b"zero", ("one",)), (b"one", ("two",))]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "the file is empty"),
        (
            "a.csv",
            b"url,caption\nx,y\n",
            r"usual columns filepath, .*there are: url, capt",
        ),
        (
            "a.csv",
            b"filepath,words\nx,y\n",
            r"usual columns caption, .*there are: filepath, wo",
        ),
        ("a.csv", b"images/0.png,a cat\nimages/1.png,a dog\n", r"there are: images/0\.png, a cat"),
        ("a.csv", "filepath,caption\nx,y\n".encode("utf-16"), "save it as UTF-8"),
        ("a.csv", b"filepath,caption\n", "no sample in it"),
        ("a.csv", b"filepath,caption\nx,\ny, \n", "none of the first 2 samples has a caption"),
        ("a.csv.gz", b"\x1f\x8b", "unpack it first"),
        ("a.jsonl", b"filepath,caption\nx,y\n", "no JSONL, an object on each line: .*no JSON"),
        ("a.jsonl", b"[1]\n", "no JSON object"),
        ("a.jsonl", b'{"path": 1}\n', r"usual columns caption.*there are: path; name one with"),
    ],
)
def test_what_cannot_be_opened(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        TableSource(str(tmp_path / name), tmp_path / "index")
    assert "\n" not in str(caught.value)


def test_columns_that_are_not_there(folder):
    path = write_csv(folder / "a.csv", ["filepath", "title"], rows())
    for options in ({"image_key": "x"}, {"caption_keys": ("title", "x")}):
        with pytest.raises(UserError, match=r"no column 'x' .*; there are: filepath, title$"):
            TableSource(path, folder / "index", **options)
    with pytest.raises(UserError, match=r"no column 'title\.en'; there are: filepath, title$"):
        TableSource(path, folder / "index", caption_keys=("title.en",))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="do not exist"):
        TableSource(str(tmp_path / "none.csv"), tmp_path / "index")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("images/0 ü.png,a cat, with commas", "archive"),
        ('images/0 ü.png,"open', "archive"),
        (",a cat", "archive"),
        ("images/none.png,a cat", "read"),
        ("images,a cat", "read"),
        ("images/0 ü.png", "caption"),
        ("images/0 ü.png,", "caption"),
        ("images/0 ü.png,\udcff", "caption"),
    ],
)
def test_bad_rows(folder, line, reason):
    content = f"filepath,caption\nimages/1 ü.png,good\n{line}\n"
    (folder / "a.csv").write_bytes(content.encode(errors="surrogateescape"))
    source = TableSource(str(folder / "a.csv"), folder / "index")
    assert source[0].captions == ("good",)
    with pytest.raises(BadSampleError) as caught:
        source[1]
    assert caught.value.reason == reason


def test_file_cut_while_in_use(folder):
    path = write_csv(folder / "a.csv", ["filepath", "title"], rows())
    source = TableSource(path, folder / "index")
    (folder / "a.csv").write_bytes(b"filepath")
    with pytest.raises(BadSampleError, match="shorter than when it was indexed"):
        source[2]


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), kind=st.sampled_from(["csv", "jsonl"]))
def test_damaged_tables(folder, data, kind):
    if kind == "csv":
        content = b"filepath,title\n" + b"".join(
            b"images/%d \xc3\xbc.png,caption %d\n" % (n, n) for n in range(4)
        )
    else:
        content = b"".join(
            b'{"path": "images/%d \\u00fc.png", "text": "caption %d"}\n' % (n, n) for n in range(4)
        )
    damaged = bytearray(content[: data.draw(st.integers(0, len(content)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            place = data.draw(st.integers(0, len(damaged) - 1))
            damaged[place] = data.draw(st.sampled_from(b'",\n\r{}[]:\\a\xff\t\x00'))
    path = folder / f"a.{kind}"
    path.write_bytes(damaged)
    number = int(np.random.default_rng().integers(2**60))  # same size and time may come again
    try:
        source = TableSource(str(path), folder / f"index-{number}")
    except UserError:
        return
    for index in range(len(source)):
        try:
            assert source[index].image.startswith(b"\x89PNG")
        except BadSampleError:
            assert source.locate(index) == f"{path}, row {index}"
    lines = [line for line in bytes(damaged).split(b"\n") if line.strip(b"\r")]
    assert len(source) <= len(lines) - (kind == "csv")
    if kind == "jsonl":
        assert len(source) == len(lines)
