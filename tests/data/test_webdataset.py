import json
import os
import pickle
import random
import shutil
import tarfile
import tempfile
import threading
from pathlib import Path

import pytest
from data.stores import Bucket, web_server
from data.tars import BLOCK, header, padded, pairs, png, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError
from clip_jax.data.sources import webdataset
from clip_jax.data.sources.files import Files
from clip_jax.data.sources.tar_index import index_tars
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


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_same_samples_as_webdataset_reads(tmp_path, format):
    """The peer's own decoding of keys, images and captions, whatever the order of the members."""
    members = []
    for number in range(6):
        stem = "some/folder.d/" * (number == 2) + f"{number}" * (30 if number == 4 else 3)
        if format != tarfile.USTAR_FORMAT and number == 5:
            stem = "ü" * 90
        sample = [
            (f"{stem}.jpg", bytes([number]) * 700 * number),
            (f"{stem}.json", json.dumps({"caption": f"json {number}"}).encode()),
            (f"{stem}.txt", f"text {number}".encode()),
            (f"{stem}.cls", b"7"),
        ]
        members += random.Random(number).sample(sample, 4)
    path = write_tar(tmp_path / "a.tar", members, format)
    source = WebdatasetSource(str(path), tmp_path / "index")
    keyed = WebdatasetSource(str(path), tmp_path / "index", caption_keys=["caption", "txt"])
    with path.open("rb") as stream:
        peers = list(group_by_keys(tar_file_expander([{"url": "a.tar", "stream": stream}])))
    assert len(source) == len(peers) == 6
    for index, peer in enumerate(peers):
        record = source[index]
        assert record == (peer["jpg"], (peer["txt"].decode(),), peer["__key__"], ())
        assert keyed[index].captions == (f"json {index}", f"text {index}")
        assert source.captions(index) == record.captions
        assert source.locate(index) == f"{path}, key {record.key}"
        assert source.shard(index) == str(path)


def members_with(text=None, content=None):
    """A sample with these members."""
    members = [("a.png", png(0))]
    if content is not None:
        members.append(("a.json", content))
    if text is not None:
        members.append(("a.txt", text))
    return members


def test_caption_keys_and_weights(tmp_path):
    content = json.dumps({"alt": ["x", "y"], "long": "z"}).encode()
    path = str(write_tar(tmp_path / "a.tar", members_with(b"raw", content)))
    source = WebdatasetSource(
        path, tmp_path / "index", caption_keys=("txt", "alt"), caption_weights=(3, 1)
    )
    assert source[0].captions == source.captions(0) == ("raw", "x", "y")
    assert source[0].weights == (0.75, 0.125, 0.125)
    assert WebdatasetSource(path, tmp_path / "index", caption_keys=["txt"])[0].captions == ("raw",)


def test_json_serves_where_the_txt_has_no_caption(tmp_path):
    path = write_tar(tmp_path / "a.tar", members_with(b"\xff", b'{"caption": "instead"}'))
    source = WebdatasetSource(str(path), tmp_path / "index")
    assert source[0].captions == source.captions(0) == ("instead",)


@pytest.mark.parametrize(
    ("text", "content", "message"),
    [
        (None, b"{broken", "does not parse"),
        (None, b'{"caption": 7}', "no caption"),
        (b" ", None, "no caption"),
        (b"\xfc", None, "not UTF-8"),
    ],
)
def test_unusable_caption_is_the_samples_fault(tmp_path, text, content, message):
    path = write_tar(tmp_path / "a.tar", members_with(text, content))
    source = WebdatasetSource(str(path), tmp_path / "index")
    for read in (source.__getitem__, source.captions):
        with pytest.raises(BadSampleError, match=message) as caught:
            read(0)
        assert caught.value.reason == "caption"
    assert source.locate(0) == f"{path}, key a"


def test_one_read_a_sample(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", members_with(b"text", b"{}" * 500))
    source = WebdatasetSource(str(path), tmp_path / "index")
    reads = []
    monkeypatch.setattr(
        Files, "read", lambda *args, read=Files.read: reads.append(args[2:]) or read(*args)
    )
    assert source[0].captions == ("text",)
    assert reads == [(0, 5 * 512 + len(png(0)) // 512 * 512 + 512 + 4)]  # the json read over
    reads.clear()
    source.captions(0)
    assert reads == [(reads[0][0], 512 + 4)]


def test_members_far_apart_are_read_one_by_one(tmp_path):
    members = members_with(b"text")
    members.insert(1, ("a.mp4", b"m" * 100_000))
    path = write_tar(tmp_path / "a.tar", members)
    source = WebdatasetSource(str(path), tmp_path / "index")
    assert source[0] == (png(0), ("text",), "a", ())


def test_pickle_is_small_and_needs_no_open_file(source):
    source[0]
    data = pickle.dumps(source)
    assert len(data) < 2000
    assert [record.key for record in pickle.loads(data)] == [record.key for record in source]


@pytest.mark.parametrize("most_mapped", [0, 2**20])
def test_rows_of_small_and_large_indexes(source, monkeypatch, most_mapped):
    monkeypatch.setattr(webdataset, "_MOST_MAPPED_BYTES", most_mapped)
    expected = list(source)
    copy = pickle.loads(pickle.dumps(source))
    before = len(os.listdir("/proc/self/fd"))
    assert list(copy) == expected
    # Three tars and the index; a mapping has a descriptor of its own.
    assert len(os.listdir("/proc/self/fd")) - before == (5 if most_mapped else 4)
    del copy
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_share_a_source(source):
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
    shutil.copyfile(write_tar(tmp_path / "new.tar", pairs(1, 4)), tmp_path / "0.tar")
    for index in range(4):
        with pytest.raises(BadSampleError, match=r"0.tar: changed since it was indexed") as caught:
            source[index]
        assert caught.value.reason == "archive"
        assert source.locate(index).startswith(f"{tmp_path / '0.tar'}, byte ")
    assert source[4].key == "s0100"


@pytest.mark.parametrize("place", [100, 148, 512])
def test_names_damaged_while_in_use(tmp_path, place):
    """Of a name that precedes the member's own header, of which alone there is a check."""
    path = write_tar(
        tmp_path / "a.tar",
        [("ü" * 90 + ".jpg", b"x"), ("ü" * 90 + ".txt", b"y")],
        tarfile.PAX_FORMAT,
    )
    source = WebdatasetSource(str(path), tmp_path / "index")
    assert source.locate(0) == f"{path}, key {'ü' * 90}"
    with path.open("r+b") as stream:
        stream.seek(place)
        stream.write(b"\xff" * 8)
    with pytest.raises(BadSampleError, match=r"a.tar: changed since it was indexed \(") as caught:
        source[0]
    assert caught.value.reason == "archive"
    assert source.locate(0) == f"{path}, byte 0"
    assert source.captions(0) == ("y",)


def test_tar_cut_while_in_use(source, tmp_path):
    os.truncate(tmp_path / "0.tar", 2600)
    assert source[0].key == "s0000"
    with pytest.raises(BadSampleError, match="changed"):
        source[1]


def test_a_tar_that_has_gone_keeps_its_places(source, tmp_path, caplog):
    path = str(tmp_path / "{0..2}.tar")
    os.remove(tmp_path / "1.tar")
    again = WebdatasetSource(path, tmp_path / "index")
    assert len(again) == 15
    assert "1 of 3 tars have gone since they were indexed" in caplog.text
    with pytest.raises(BadSampleError, match=r"1.tar: FileNotFoundError") as caught:
        again[4]
    assert caught.value.reason == "read"
    assert again.shard(4) == str(tmp_path / "1.tar")
    assert again.locate(4).startswith(str(tmp_path / "1.tar"))
    assert [again[index].key for index in (3, 9)] == ["s0003", "s0200"]
    with pytest.raises(UserError, match=r"1 of 3 files .* do not exist"):
        WebdatasetSource(path, tmp_path / "index", on_bad_sample="fail")
    with pytest.raises(UserError, match=r"1 of 3 files .* do not exist"):
        WebdatasetSource(path, tmp_path / "never-indexed")


def test_a_damaged_tar(source, tmp_path, caplog):
    os.truncate(tmp_path / "1.tar", 7000)
    path = str(tmp_path / "{0..2}.tar")
    for _ in range(2):  # the second time from the index
        caplog.clear()
        again = WebdatasetSource(path, tmp_path / "index")
        assert len(again) == 4 + 2 + 6
        assert [again[index].key for index in (4, 5, 6)] == ["s0100", "s0101", "s0200"]
        ((tar, reason),) = again.damaged
        assert tar == str(tmp_path / "1.tar")
        assert reason.endswith("after 2 whole samples")
        assert caplog.text.count("1 of 3 tars are damaged or were cut short") == 1
        with pytest.raises(
            UserError, match=r"1.tar: the file ends inside .* leave it out"
        ) as caught:
            WebdatasetSource(path, tmp_path / "index", on_bad_sample="fail")
        assert "\n" not in str(caught.value)


def test_a_bucket(source, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    Bucket.empty()
    for number in range(3):
        Bucket.objects[f"b/{number}.tar"] = (tmp_path / f"{number}.tar").read_bytes()
    remote = WebdatasetSource("bucket://b/{0..2}.tar", tmp_path / "remote")
    assert list(map(remote.__getitem__, range(15))) == list(map(source.__getitem__, range(15)))
    copy = pickle.loads(pickle.dumps(remote))
    Bucket.errors += [TimeoutError("late")] * 3
    Bucket.requests.clear()
    assert copy[7] == source[7]
    assert len(Bucket.requests) == 4
    Bucket.errors += [TimeoutError("late")] * 4
    with pytest.raises(BadSampleError, match=r"TimeoutError: late \(4 attempts\)") as caught:
        copy[7]
    assert caught.value.reason == "read"
    Bucket.objects["b/1.tar"] = bytes(len(Bucket.objects["b/1.tar"]))
    with pytest.raises(BadSampleError, match="changed"):
        copy[7]
    del Bucket.objects["b/1.tar"]
    with pytest.raises(BadSampleError, match="FileNotFoundError"):
        copy[7]
    assert copy[3] == source[3]


def test_nothing_usable(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"x"), ("b.gif", b"y")])
    with pytest.raises(UserError, match=r"no sample in 1 tars \(2 without image or caption"):
        WebdatasetSource(str(path), tmp_path / "index")


def test_skipped_samples_are_told(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", [*pairs(0, 2), ("z.txt", b"x")])
    source = WebdatasetSource(str(path), tmp_path / "index")
    assert source.num_skipped == 1
    assert "1 samples without image or caption left out, 2 kept" in caplog.text


TINY = b"".join(
    header(name, len(data)) + padded(data)
    for name, data in [
        *[(b"a.jpg", b"i" * 700), (b"a.txt", b"text a")],
        *[(b"b.png", b"j"), (b"b.json", b'{"caption": "text b"}'), (b"b.txt", b"\xff")],
        *[(b"c.webp", b""), (b"c.txt", b"text c")],
    ]
)
LONG = b"d" * 120
TINY += header(b"././@LongLink", 125, flag=b"L") + padded(LONG + b".jpg\0")
TINY += header(LONG[:100], 4) + padded(b"long")
TINY += header(b"././@LongLink", 125, flag=b"L") + padded(LONG + b".txt\0")
TINY += header(LONG[:100], 6) + padded(b"text d")
TINY += header(b"./PaxHeaders/e", 14, flag=b"x") + padded(b"14 path=e.jpg\n")
TINY += header(b"short.jpg", 3) + padded(b"pax")
TINY += header(b"e.txt", 6) + padded(b"text e")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_tars_damaged_in_use_give_records_or_bad_samples(seed):
    rng = random.Random(seed)
    whole = TINY
    Bucket.empty()
    Bucket.objects["b/a.tar"] = whole
    with tempfile.TemporaryDirectory() as folder:
        source = WebdatasetSource("bucket://b/a.tar", Path(folder))
        expected = [source[index] for index in range(5)]
        assert [record.key for record in expected] == ["a", "b", "c", LONG.decode(), "e"]
        for _ in range(20):
            content = bytearray(whole[: rng.choice([len(whole), rng.randint(0, len(whole))])])
            for _ in range(min(rng.randint(0, 4), len(content))):
                content[rng.randrange(len(content))] = rng.randint(0, 255)
            Bucket.objects["b/a.tar"] = bytes(content)
            for index, record in enumerate(expected):
                try:
                    read = source[index]
                except BadSampleError as error:
                    bad = error.reason
                    assert "bucket://b/a.tar" in source.locate(index)
                else:
                    bad = None
                    # No other sample's, whatever the bytes; long names have no check.
                    assert read.key == record.key or index >= 3
                    assert len(read.image) == len(record.image)
                assert bad in (None, "archive", "caption")


def test_a_tar_without_an_end_marker(source, tmp_path, caplog):
    """Cut between two samples, perhaps: told each time, but whole as far as one can see."""
    with tarfile.open(tmp_path / "1.tar") as tar:
        last = tar.getmembers()[-1]
    os.truncate(tmp_path / "1.tar", last.offset_data + BLOCK)  # of a caption
    path = str(tmp_path / "{0..2}.tar")
    for _ in range(2):  # the second time from the index
        caplog.clear()
        again = WebdatasetSource(path, tmp_path / "index", on_bad_sample="fail")
        assert again.damaged == [(str(tmp_path / "1.tar"), "no end marker: was it cut short?")]
        assert len(again) == len(source)
        assert "1 of 3 tars are damaged or were" in caplog.text
    assert index_tars(path, tmp_path).damaged == again.damaged


def test_a_server_without_ranges(source, tmp_path):
    pytest.importorskip("aiohttp")
    content = (tmp_path / "0.tar").read_bytes()
    with web_server({"/0.tar": content}, ranges=False) as root:
        remote = WebdatasetSource(f"{root}/0.tar", tmp_path / "remote")
        with pytest.raises(UserError, match=r"0.tar: the server ignores byte ranges, which both"):
            remote[0]
