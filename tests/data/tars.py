"""Hand-made tars for the tests: members, and headers of every dialect, byte by byte."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

BLOCK = 512


def png(seed: int, size: int = 16) -> bytes:
    """A small PNG of noise, another for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_tar(
    path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT
) -> Path:
    """Write members with the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(first: int, count: int, prefix: str = "s") -> list[tuple[str, bytes]]:
    """Members of `count` samples with a PNG and a txt each."""
    members = []
    for number in range(first, first + count):
        members.append((f"{prefix}{number:04d}.png", png(number)))
        members.append((f"{prefix}{number:04d}.txt", f"caption {number}".encode()))
    return members


def header(
    name: bytes,
    size: int,
    *,
    flag: bytes = b"0",
    prefix: bytes = b"",
    magic: bytes = b"ustar\x0000",
    size_field: bytes | None = None,
    signed: bool = False,
) -> bytes:
    """One 512-byte tar header with a right checksum."""
    block = bytearray(BLOCK)
    block[0 : len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = size_field if size_field is not None else b"%011o\0" % size
    block[136:148] = b"%011o\0" % 0
    block[148:156] = b" " * 8
    block[156:157] = flag
    block[257:265] = magic
    block[345 : 345 + len(prefix)] = prefix
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in block)
    block[148:156] = b"%06o\0 " % total
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


END = bytes(2 * BLOCK)
