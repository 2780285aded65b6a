import csv
import io
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError
from clip_jax.data.sources import table_rows
from clip_jax.data.sources.files import FileInfo
from clip_jax.data.sources.table_rows import index_rows, row_starts, split_row


class Text(io.BytesIO):
    """Sequential reading in memory, `block` bytes at most at a time."""


def rows_of(content, delimiter):
    """The rows as `row_starts` finds them, as bytes."""
    starts = [*np.concatenate(list(row_starts(Text(content), delimiter, "x"))), len(content)]
    return [content[first:last].rstrip(b"\r\n") for first, last in itertools.pairwise(starts)]


@pytest.fixture(params=[1, 5, 2**20])
def block(request, monkeypatch):
    monkeypatch.setattr(table_rows, "_BLOCK", request.param)
    return request.param


CONTENT = st.lists(
    st.sampled_from(["a", '"', '""', ",", "\n", "\r\n", "ü", '"b,\n"', "\t"]), max_size=25
).map("".join)


@settings(max_examples=400, deadline=None)
@given(CONTENT, st.sampled_from([1, 5, 2**20]))
@example('a,"b\nc"\n\n"d""e",f\r\n', 3)
@example('x"y,"z\n"\n', 2**20)
def test_equals_the_csv_module(content, block):
    before, table_rows._BLOCK = table_rows._BLOCK, block
    try:
        try:
            ours = [split_row(row, b",") for row in rows_of(content.encode(), b",")]
        except BadSampleError:  # a field is open at the end: the csv module takes that for its end
            content += '"'
            ours = [split_row(row, b",") for row in rows_of(content.encode(), b",")]
    finally:
        table_rows._BLOCK = before
    theirs = [row for row in csv.reader(io.StringIO(content, newline="")) if row]
    assert [[field.decode() for field in row] for row in ours] == theirs


def test_rows_that_are_lines(block):
    content = b'{"a": 1}\n\n\r\n{"a": "x\\n"}\r\n{"a": "'
    assert rows_of(content, None) == [b'{"a": 1}', b'{"a": "x\\n"}', b'{"a": "']


def test_a_lost_quote_costs_one_row(monkeypatch):
    monkeypatch.setattr(table_rows, "_MAX_QUOTED", 200)
    good = [f"{n},row {n}".encode() for n in range(100)]
    rows = [*good[:50], b'50,"lost', *good[51:]]
    for block in (100, 2**20):
        monkeypatch.setattr(table_rows, "_BLOCK", block)
        assert rows_of(b"\n".join(rows), b",") == rows
    with pytest.raises(BadSampleError, match="does not end"):
        split_row(rows[50], b",")


def test_endless_lines(monkeypatch):
    monkeypatch.setattr(table_rows, "_BLOCK", 2**20)
    monkeypatch.setattr(table_rows, "_MAX_LINE", 3 * 2**20)
    with pytest.raises(UserError, match=r"pictures\.bin: no end of line within 3 MiB"):
        list(row_starts(Text(bytes(5 * 2**20)), None, "pictures.bin"))


def test_index(tmp_path, block):
    (tmp_path / "a.csv").write_bytes(b"\n\nh,k\n1,2\n\n3,4")
    (tmp_path / "b.csv").write_bytes(b"h,k\n")
    (tmp_path / "c.jsonl").write_bytes(b"{}\n{}\n")
    paths = [str(tmp_path / name) for name in ("a.csv", "b.csv", "c.jsonl")]
    infos = [FileInfo(1, "version")] * 3
    for _ in range(2):
        starts, counts = index_rows(paths, infos, [b",", b",", None], tmp_path / "index")
        assert counts.tolist() == [2, 0, 2]
        assert starts().tolist() == [6, 11, 0, 3]
    assert len(list((tmp_path / "index").iterdir())) == 2
    (tmp_path / "b.csv").write_bytes(b"h,k\n5,6\n")
    infos[1] = FileInfo(2, "version")
    _, counts = index_rows(paths, infos, [b",", b",", None], tmp_path / "index")
    assert counts.tolist() == [2, 1, 2]
