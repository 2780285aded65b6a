import json
import os
import pickle
import shutil
import threading

import pytest
from data.tars import pairs, png, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_jax.config.errors import UserError
from clip_jax.data.sources import webdataset
from clip_jax.data.sources.webdataset import WebdatasetSource


@pytest.fixture
def source(tmp_path):
    for tar in range(3):
        write_tar(tmp_path / f"{tar}.tar", pairs(100 * tar, 4 + tar))
    return WebdatasetSource(str(tmp_path / "{0..2}.tar"), tmp_path / "index")


def test_records_in_order(source):
    assert len(source) == 4 + 5 + 6
    numbers = [*range(4), *range(100, 105), *range(200, 206)]
    for index, number in enumerate(numbers):
        record = source[index]
        assert record.image == png(number)
        assert record.captions == (f"caption {number}",)
        assert record.key == f"s{number:04d}"


@pytest.mark.parametrize("index", [-1, 15])
def test_out_of_range(source, index):
    with pytest.raises(IndexError, match=f"{index} of 15"):
        source[index]


@pytest.mark.parametrize(
    ("text", "content", "expected"),
    [
        (b" a cat \n", None, ("a cat",)),
        (None, {"caption": "a cat"}, ("a cat",)),
        (None, {"captions": ["a", "b", "a", " "], "caption": "c"}, ("a", "b")),
        (b"a", {"captions": ["b", "a"]}, ("a", "b")),
        (b"", {"caption": "fallback"}, ("fallback",)),
        (b"a\nb", None, ("a\nb",)),
        ("größer".encode(), {"caption": None}, ("größer",)),
    ],
)
def test_caption_sources(tmp_path, text, content, expected):
    members = [("a.png", png(0))]
    if text is not None:
        members.append(("a.txt", text))
    if content is not None:
        members.append(("a.json", json.dumps(content).encode()))
    source = WebdatasetSource(str(write_tar(tmp_path / "a.tar", members)), tmp_path / "index")
    assert source[0].captions == expected


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b"{broken", "does not parse"),
        ("a.json", b"[1]", "no caption"),
        ("a.json", b'{"caption": 7}', "no caption"),
        ("a.txt", b" ", "no caption"),
    ],
)
def test_unusable_caption_is_the_samples_fault(tmp_path, name, data, message):
    path = write_tar(tmp_path / "a.tar", [("a.png", png(0)), (name, data)])
    source = WebdatasetSource(str(path), tmp_path / "index")
    with pytest.raises(ValueError, match=message) as caught:
        source[0]
    assert not isinstance(caught.value, UserError)
    assert source.locate(0) == f"{path}, key a"


def test_pickle_is_small_and_needs_no_open_file(source):
    source[0]
    data = pickle.dumps(source)
    assert len(data) < 2000
    assert [record.key for record in pickle.loads(data)] == [record.key for record in source]


def test_few_files_stay_open(source, monkeypatch):
    monkeypatch.setattr(webdataset, "_MAX_OPEN_TARS", 2)
    copy = pickle.loads(pickle.dumps(source))
    before = len(os.listdir("/proc/self/fd"))
    for index in [0, 5, 10] * 20:
        copy[index]
    assert len(os.listdir("/proc/self/fd")) - before == 3  # two tars and the index
    del copy
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_share_a_source(source, monkeypatch):
    monkeypatch.setattr(webdataset, "_MAX_OPEN_TARS", 1)  # every read opens and closes
    copy = pickle.loads(pickle.dumps(source))
    expected = [record.key for record in source]
    wrong = []

    def read(offset):
        for step in range(300):
            index = (offset + step * 7) % len(expected)
            if copy[index].key != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_tar_replaced_while_in_use(source, tmp_path):
    shutil.copyfile(write_tar(tmp_path / "new.tar", [("x.txt", b"x" * 3000)]), tmp_path / "0.tar")
    with pytest.raises(ValueError, match="changed"):
        [source[index] for index in range(4)]


def test_nothing_usable(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"x"), ("b.gif", b"y")])
    with pytest.raises(UserError, match=r"no sample in 1 tars \(2 without image or caption\)"):
        WebdatasetSource(str(path), tmp_path / "index")


def test_skipped_samples_are_told(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", [*pairs(0, 2), ("z.txt", b"x")])
    source = WebdatasetSource(str(path), tmp_path / "index")
    assert source.num_skipped == 1
    assert "1 samples without image or caption left out, 2 kept" in caplog.text


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_tars_give_user_errors_or_records(tmp_path, data):
    path = write_tar(tmp_path / "whole" / "a.tar", pairs(0, 2))
    content = bytearray(path.read_bytes()[: data.draw(st.integers(0, 6000))])
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(content)
    shutil.rmtree(tmp_path / "index", ignore_errors=True)  # same size and time may come again
    try:
        source = WebdatasetSource(str(damaged), tmp_path / "index")
    except UserError:
        return
    for index in range(len(source)):
        try:
            source[index]
        except ValueError:
            assert str(damaged) in source.locate(index)
