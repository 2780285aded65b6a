import os
import tarfile

import pytest
from data.tars import END, header, padded, pairs, write_tar

from clip_jax.data.record import BadSampleError
from clip_jax.data.sources import tar_stream
from clip_jax.data.sources.files import open_sequential
from clip_jax.data.sources.tar_scan import NO_END, ROW, scan
from clip_jax.data.sources.tar_stream import END as LAST
from clip_jax.data.sources.tar_stream import tar_samples


def read(path, offset=0):
    """The samples, and why the tar could not be read on."""
    samples = []
    with open_sequential(str(path), offset, 0) as file:
        try:
            samples.extend(tar_samples(file))
        except BadSampleError as error:
            return samples, error
    return samples, None


def indexed(path):
    """What the index knows of a tar: image, text and json of each sample, and whether it ends."""
    found = scan(str(path), 0)
    data = path.read_bytes()

    def member(block, size):
        return data[512 * block : 512 * block + size] if block else None

    rows = [ROW.unpack(row.tobytes()) for row in found.rows]
    return [tuple(map(member, row[:3], row[3:6])) for row in rows], found.damage not in ("", NO_END)


def contents(samples):
    """As `indexed` gives them: samples without image or caption are not among them."""
    found = [(sample.image, sample.text, sample.json) for sample in samples]
    return [one for one in found if one[0] is not None and one[1:] != (None, None)]


ODD = [
    ("a/deep/0001.jpg", b"1" * 700),
    ("a/deep/0001.cls", b"3"),
    ("a/deep/0001.txt", b"one"),
    ("._0001.jpg", b"meta"),
    ("0002.txt", b"no picture"),
    ("x" * 120 + "/0003.png", b"3" * 512),
    ("x" * 120 + "/0003.json", b'{"caption": "three"}'),
    ("0004.webp", b""),
    ("README", b"no extension"),
    ("0005.JPG", b"5"),
    ("0005.png", b"another picture"),
    ("0005.txt", b"five"),
    ("0005.json", b"{}"),
]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_samples_are_those_of_the_index(tmp_path, format):
    path = write_tar(tmp_path / "a.tar", ODD, format)
    samples, error = read(path)
    assert error is None
    assert contents(samples) == indexed(path)[0]
    assert [sample.key for sample in samples][1:3] == ["0002", "x" * 120 + "/0003"]
    assert samples[-1].after == LAST


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reading_goes_on_at_any_sample(tmp_path, format):
    path = write_tar(tmp_path / "a.tar", ODD, format)
    samples, _ = read(path)
    for number, sample in enumerate(samples[:-1], 1):
        assert read(path, sample.after) == (samples[number:], None)


def test_cut_off_at_any_byte(tmp_path):
    """The same samples as the index has, and damage seen where it sees it."""
    path = write_tar(tmp_path / "a.tar", ODD[:3] + ODD[5:7] + ODD[-3:-1], tarfile.PAX_FORMAT)
    for length in range(11 * 1024, -1, -1):
        if 4 < length % 512 < 508:  # a byte more or less inside a block makes no difference
            continue
        os.truncate(path, length)
        samples, error = read(path)
        expected, damaged = indexed(path)
        assert contents(samples) == expected, length
        assert (error is not None) == damaged, length
        assert error is None or error.reason == "archive"
        for number, sample in enumerate(samples):  # and after an interruption too
            if sample.after != LAST:
                rest, again = read(path, sample.after)
                assert rest == samples[number + 1 :]
                assert str(again) == str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a tar of 0 bytes at byte 0"),
        (b"<html>" + bytes(600), "not a tar header: .* at byte 0"),
        (header(b"a.jpg", 2**32) + END, r"the file ends inside a member \(1024 of 4294967296 b"),
        (header(b"long", 2**21, flag=b"L") + bytes(2**21) + END, "record of 2097152 bytes"),
        ((header(b"a.txt", 1) + padded(b"a")) * 2 + END, "the name a.txt twice at byte 1024"),
    ],
)
def test_damage(tmp_path, content, message):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    samples, error = read(path)
    assert contents(samples) == []
    with pytest.raises(BadSampleError, match=message):
        raise error


def test_a_huge_member_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_stream, "MAX_MEMBER_BYTES", 2**20)
    path = tmp_path / "a.tar"
    size = 2**20 + 1
    with path.open("wb") as file:
        file.write(header(b"a.jpg", size))
        file.seek(-(-size // 512) * 512, os.SEEK_CUR)  # a hole: takes no room on the disk
        file.write(header(b"a.txt", 1) + padded(b"a"))
        file.write(header(b"b.jpg", 1) + padded(b"b") + header(b"b.txt", 1) + padded(b"b") + END)
    (huge, small), error = read(path)
    assert error is None
    assert huge.image is None
    with pytest.raises(BadSampleError, match=f"the jpg has {size} bytes"):
        huge.record((), ())
    assert small.record((), ()).image == b"b"


def test_what_a_sample_lacks(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b""), ("b.txt", b""), ("c.jpg", b"c")])
    samples, _ = read(path)
    reasons = []
    for sample in samples:
        with pytest.raises(BadSampleError) as caught:
            sample.record((), ())
        reasons.append(caught.value.reason)
    assert reasons == ["caption", "image", "caption"]


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(0, 3))
    with open_sequential(str(path), 0, 0) as file:
        os.truncate(path, 3000)
        samples = tar_samples(file)
        assert next(samples).key == "s0000"
        with pytest.raises(BadSampleError, match="ends inside"):
            list(samples)
