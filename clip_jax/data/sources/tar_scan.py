"""One walk over a webdataset tar: which samples it holds, and where their members lie."""

import struct
import zlib
from array import array
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_jax.data.sources.files import Files, is_remote
from clip_jax.data.sources.tar_headers import BLOCK, Member, TarError, short_name, walk

IMAGE_EXTENSIONS = frozenset({b"jpg", b"jpeg", b"png", b"webp"})
# Larger members are left out: no picture is, and they would have to be held in memory.
MAX_MEMBER_BYTES = 256 * 2**20
# A sample's row, all uint32: where the data of its image, txt and json begin, in blocks of 512
# bytes (0: there is no such member); their bytes; the blocks of headers before the image's data
# from where its name is written; and the CRC-32 of each member's header, by which a reader sees
# that the tar is still the one that was scanned.
ROW = struct.Struct("<10I")
NUM_FIELDS = 10
# Of a tar whose last sample is whole, though its writer, or a copy, was stopped early; or that was
# written so.
NO_END = "no end marker: was it cut short?"
_MAX_BYTES = 2**32 * BLOCK  # of a tar: 2 TB
# Bytes per read. Local: a caption, its header and the next header mostly fit in one. Remote: a
# request costs 50 ms, in which 4 MiB come in anyway; members longer than that are passed over.
_LOCAL_WINDOW = 4096
_REMOTE_WINDOW = 4 * 2**20


class TarScan(NamedTuple):
    """What a tar holds."""

    rows: NDArray[np.uint32]  # [n, 10]: see ROW
    num_skipped: int  # samples without image or caption
    damage: str  # why and where the tar cannot be read on, or NO_END; "": it can and is whole


def split_name(name: bytes) -> tuple[bytes, bytes] | None:
    """Split a member name into key and lower-case extension as webdataset does, or return None.

    The key is all up to the first dot of the last path component; a name without extension, a
    hidden file (`._001.jpg`) and a meta file (`__meta__.json`) belong to no sample.
    """
    directory, slash, base = name.rpartition(b"/")
    stem, dot, extension = base.partition(b".")
    if not dot or not stem or (stem[:2] == b"__" and stem[-2:] == b"__"):
        return None
    return directory + slash + stem, extension.lower()


class _Sample:
    """The members seen so far of one sample."""

    __slots__ = ("extensions", "image", "json", "key", "text")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.extensions: set[bytes] = set()
        self.image: Member | None = None
        self.text: Member | None = None
        self.json: Member | None = None

    def add(self, extension: bytes, member: Member) -> None:
        if extension in self.extensions:
            name = " ".join(member.name.decode(errors="replace").split())
            raise TarError(member.start, f"the name {name} twice")
        self.extensions.add(extension)
        if member.size > MAX_MEMBER_BYTES:
            return
        if extension in IMAGE_EXTENSIONS:
            self.image = self.image or member
        elif extension == b"txt":
            self.text = member
        elif extension == b"json":
            self.json = member

    def row(self) -> tuple[int, ...] | None:
        """The sample's row in the index, or None where it lacks an image or a caption."""
        image, text, json = self.image, self.text, self.json
        if image is None or (text is None and json is None):
            return None
        image_block, image_bytes, image_check = _place(image)
        text_block, text_bytes, text_check = _place(text) if text else (0, 0, 0)
        json_block, json_bytes, json_check = _place(json) if json else (0, 0, 0)
        name_blocks = 1
        if image.data - image.start != BLOCK and short_name(image.header) != image.name:
            name_blocks = (image.data - image.start) // BLOCK
        blocks = (image_block, text_block, json_block)
        sizes = (image_bytes, text_bytes, json_bytes)
        return (*blocks, *sizes, name_blocks, image_check, text_check, json_check)


def _place(member: Member) -> tuple[int, int, int]:
    return member.data // BLOCK, member.size, zlib.crc32(member.header)


def scan(path: str, retries: int = 3) -> TarScan:
    """Scan a tar's headers. A damaged, cut or compressed tar gives the whole samples before that.

    Raises BadSampleError("read") where it cannot be read, UserError if a package is missing.
    """
    files = Files([path], retries, max_open=1)
    length = files.size(0)
    rows = array("I")
    skipped = 0
    sample = _Sample(b"")
    damage = ""
    ends: list[bool] = []
    members = _note_end(walk(_WindowedReader(files, is_remote(path)), length), ends)
    try:
        if not 0 < length < _MAX_BYTES:
            raise TarError(0, f"a tar of {length} bytes")
        for member in members:
            parts = split_name(member.name)
            if parts is None:
                continue
            if parts[0] != sample.key:
                row = sample.row()
                if row is not None:
                    rows.extend(row)
                elif sample.extensions:
                    skipped += 1
                sample = _Sample(parts[0])
            sample.add(parts[1], member)
    except TarError as error:
        damage = f"{error.reason} at byte {error.offset}"
    row = sample.row()
    if row is not None:
        rows.extend(row)
    elif sample.extensions and not damage:  # of a sample that is cut off, nobody knows
        skipped += 1
    found = np.frombuffer(rows, np.uint32).reshape(-1, NUM_FIELDS)
    if damage:
        damage += f", after {len(found)} whole samples"
    elif not all(ends):
        damage = NO_END
    return TarScan(found, skipped, damage)


def _note_end(members: Generator[Member, None, bool], ends: list[bool]) -> Iterator[Member]:
    """The members; then adds whether the end marker was there."""
    ends.append((yield from members))


class _WindowedReader:
    """A `pread(num_bytes, offset)` that reads ahead a little: fewer system calls or requests."""

    def __init__(self, files: Files, remote: bool) -> None:
        self._files = files
        self._size = _REMOTE_WINDOW if remote else _LOCAL_WINDOW
        self._window = b""
        self._start = 0

    def __call__(self, num_bytes: int, offset: int) -> bytes:
        position = offset - self._start
        if not 0 <= position <= len(self._window) - num_bytes:
            self._window = self._files.read(0, offset, max(self._size, num_bytes))
            self._start = offset
            position = 0
        return self._window[position : position + num_bytes]
