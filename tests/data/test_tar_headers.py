"""The header walk against hand-made headers of every dialect, and against `tarfile`."""

import io
import tarfile

import pytest
from data.tars import END, header, padded, pairs, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_jax.data.sources.tar_headers import Member, TarError, first_name, walk


def members(archive: bytes) -> list[Member]:
    return list(walk(lambda count, offset: archive[offset : offset + count], len(archive)))


def test_plain_member_positions():
    archive = header(b"a.txt", 5) + padded(b"hello") + header(b"b.txt", 0) + END
    assert members(archive) == [
        Member(b"a.txt", 0, 512, 5, archive[:512]),
        Member(b"b.txt", 1024, 1536, 0, archive[1024:1536]),
    ]


def test_ustar_prefix_is_joined():
    assert members(header(b"a.txt", 0, prefix=b"some/dir") + END)[0].name == b"some/dir/a.txt"


def test_gnu_magic_has_no_prefix():
    # GNU's own format keeps access times in the bytes where POSIX keeps the prefix.
    archive = header(b"a.txt", 0, prefix=b"12345670123", magic=b"ustar  \0") + END
    assert members(archive)[0].name == b"a.txt"


def test_old_header_without_magic_and_flag():
    assert members(header(b"a.txt", 0, magic=bytes(8), flag=b"\0") + END)[0].name == b"a.txt"


def test_gnu_long_name_counts_into_the_start():
    name = b"d/" * 120 + b"a.txt"
    archive = (
        header(b"first.txt", 0)
        + header(b"././@LongLink", len(name) + 1, flag=b"L")
        + padded(name + b"\0")
        + header(name[:100], 3)
        + padded(b"abc")
        + header(b"last.txt", 0)
        + END
    )
    first, long, last = members(archive)
    assert (long.name, long.start, long.data, long.size) == (name, 512, 2048, 3)
    assert (first.name, last.name) == (b"first.txt", b"last.txt")
    assert first_name(archive[long.start : long.data]) == name
    with pytest.raises(TarError, match="inside a header"):
        first_name(archive[long.start : long.data - 1])
    with pytest.raises(TarError, match="no member"):
        first_name(END)


def pax_record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body)
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def test_pax_path_and_size_override_the_header_once():
    records = pax_record("path", "ü/" + "x" * 200 + ".txt") + pax_record("size", "3")
    archive = (
        header(b"PaxHeader", len(records), flag=b"x")
        + padded(records)
        + header(b"short", 0)
        + padded(b"abc")
        + header(b"b.txt", 0)
        + END
    )
    first, second = members(archive)
    assert first.name == ("ü/" + "x" * 200 + ".txt").encode()
    assert first.size == 3
    assert second[:4] == (b"b.txt", 2048, 2560, 0)


def test_global_pax_header_is_passed_over():
    records = pax_record("comment", "made by git")
    archive = header(b"g", len(records), flag=b"g") + padded(records) + header(b"a", 0) + END
    assert [member.name for member in members(archive)] == [b"a"]


def test_base_256_size():
    archive = header(b"a.txt", 0, size_field=b"\x80" + bytes(10) + b"\x03") + padded(b"abc") + END
    assert members(archive)[0].size == 3


def test_base_256_size_of_a_huge_member():
    size_field = b"\x80" + (9 * 2**30).to_bytes(11, "big")
    with pytest.raises(TarError, match=f"of {9 * 2**30} bytes"):
        members(header(b"a.txt", 0, size_field=size_field) + END)


def test_signed_checksum_of_old_writers():
    archive = header("ü.txt".encode(), 0, signed=True) + END
    assert members(archive)[0].name == "ü.txt".encode()


def test_links_and_directories_have_no_data():
    archive = (
        header(b"dir/", 0, flag=b"5")
        + header(b"link", 700, flag=b"1")  # some writers state the size of the target
        + header(b"a.txt", 0)
        + END
    )
    assert [member.name for member in members(archive)] == [b"a.txt"]


@pytest.mark.parametrize(
    ("archive", "offset", "reason"),
    [
        (header(b"a", 9) + b"short", 0, "ends inside a member"),
        (header(b"a", 0) + header(b"b", 0)[:100], 512, "ends inside a header"),
        (header(b"a", 0) + b"\xff" * 512, 512, "checksum|number field|negative"),
        (header(b"a", 0).replace(b"a", b"b"), 0, "checksum"),
        (header(b"long", 4, flag=b"L") + padded(b"name") + END, 0, "no member after it"),
        (header(b"pax", 8, flag=b"x") + padded(b"99 a=b\nx") + header(b"a", 0), 0, "pax record"),
        (
            header(b"pax", 12, flag=b"x") + padded(b"8 a=bcd\na=b\n") + header(b"a", 0),
            0,
            "pax record",
        ),
        (header(b"a", 0, flag=b"S") + END, 0, "sparse"),
        (header(b"l", 2**20 + 1, flag=b"L") + bytes(2**20 + 512), 0, "of 1048577 bytes"),
        (header(b"a", 0, size_field=b"-0000000001\0") + END, 0, "number field"),
        (header(b"a", 0, size_field=b"\xff" * 12) + END, 0, "negative"),
        (b"\x1f\x8b" + bytes(600), 0, "gzip"),
        (b"<html>" + b"x" * 600, 0, "not a tar header"),
    ],
)
def test_damage_is_located(archive, offset, reason):
    with pytest.raises(TarError, match=reason) as caught:
        members(archive)
    assert caught.value.offset == offset


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_agrees_with_tarfile(tmp_path, format):
    contents = [*pairs(0, 5), ("d" * 90 + "/" + "e" * 60 + ".txt", b"long"), ("x/y.txt", b"")]
    if format != tarfile.USTAR_FORMAT:
        contents += [("ü" * 120 + ".txt", b"longer")]
    archive = write_tar(tmp_path / "a.tar", contents, format).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        expected = [(info.name.encode(), info.offset, info.offset_data, info.size) for info in tar]
    assert [member[:4] for member in members(archive)] == expected


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_archives_never_break_the_walk(tmp_path, data):
    whole = (
        header(b"a.txt", 700)
        + padded(b"x" * 700)
        + header(b"././@LongLink", 120, flag=b"L")
        + padded(b"n" * 119 + b"\0")
        + header(b"n", 3)
        + padded(b"abc")
        + header(b"p", 12, flag=b"x")
        + padded(b"12 path=abc\n")
        + header(b"b", 0)
        + END
    )
    archive = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if archive:
            archive[data.draw(st.integers(0, len(archive) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = members(bytes(archive))
    except TarError as error:
        offset = error.offset
    else:
        offset = max((member.data + member.size for member in found), default=0)
    assert 0 <= offset <= len(archive)
