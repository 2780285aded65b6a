"""Random access to webdataset tars: an index of offsets, and one ranged read a sample."""

import logging
import mmap
import os
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError, Record
from clip_jax.data.sources.captions import captions_of
from clip_jax.data.sources.files import Files, is_remote, no_ranges
from clip_jax.data.sources.store_errors import NoRangesError
from clip_jax.data.sources.tar_headers import BLOCK, TarError, first_name, short_name
from clip_jax.data.sources.tar_index import build_indexes, index_file
from clip_jax.data.sources.tar_paths import expand_tars
from clip_jax.data.sources.tar_scan import NO_END, ROW, split_name

logger = logging.getLogger(__name__)

# Bytes between two members that are read through rather than read around: a second `pread` takes
# 2 us, as long as copying 16 KiB; a second request to a store takes 50 ms, as long as 1 MiB.
_LOCAL_GAP = 2**14
_REMOTE_GAP = 2**20
# An index up to this size is mapped, where a row takes 0.5 us; of a larger one rows are read in
# 1.5 us each, as all pages of a mapping that were touched count as memory of the process.
_MOST_MAPPED_BYTES = 48 * 2**20

_Row = tuple[int, ...]
# A member: the block of its first header that is to be read, that of its data, the bytes of the
# data and the CRC-32 of the header before it.
_Span = tuple[int, int, int, int]


class WebdatasetSource:
    """The samples of some webdataset tars, in the order of the path and of the archives.

    path: tar files; see `expand_path`. index_dir: where their indexes are kept. caption_keys,
    caption_weights: see `captions_of`. retries: of reads; see `Files`.

    A sample needs one image (jpg, jpeg, png, webp) and a caption member (txt, json). Samples
    without are left out and counted in `num_skipped`. Where there is a txt and no caption_keys, the
    json is read only if the txt holds no caption.

    A tar without an end marker is listed in `damaged` too; all of it is used.
    on_bad_sample 'skip': a damaged tar gives its whole samples before the damage and is listed in
    `damaged` (path, reason), and a tar that has gone since it was indexed keeps its places, as
    samples that cannot be read. 'fail': both raise UserError.

    Pickles to its paths and counts; files are opened where they are first read. Threads may share
    it. Raises UserError for paths that match nothing and tars without any sample.
    """

    def __init__(
        self,
        path: str,
        index_dir: Path,
        *,
        caption_keys: Sequence[str] = (),
        caption_weights: Sequence[float] = (),
        retries: int = 3,
        on_bad_sample: Literal["skip", "fail"] = "skip",
    ) -> None:
        self.path = path
        self._keys = tuple(caption_keys)
        self._weights = tuple(caption_weights)
        self._reads_text = not self._keys or "txt" in self._keys
        self._reads_json = any(key != "txt" for key in self._keys)
        skip = on_bad_sample == "skip"
        self._tars = expand_tars(path, lambda tar: skip and index_file(tar, index_dir).exists())
        index = build_indexes(self._tars, index_dir, retries=retries)
        self.num_skipped = index.num_skipped  # samples without image or caption
        self.damaged = index.damaged
        self._rows_file = index.rows_file
        self._ends: list[int] = index.counts.cumsum().tolist()
        self._files = Files(self._tars, retries)
        self._rows: _Rows | None = None
        cut = [(tar, reason) for tar, reason in self.damaged if reason != NO_END]
        if cut and not skip:
            tar, reason = cut[0]
            more = f" ({len(cut)} tars are damaged)" if len(cut) > 1 else ""
            raise UserError(
                f"{tar}: {reason}{more}; fetch or write this tar again, or leave it out of the path"
            )
        if index.gone and not skip:
            raise UserError(
                f"{len(index.gone)} of {len(self._tars)} tars have gone since they were indexed, "
                f"the first: {index.gone[0]}; bring them back, or leave them out of the path"
            )
        self._warn(index.gone)
        if len(self) == 0:
            raise UserError(
                f"{path}: no sample in {len(self._tars)} tars ({self.num_skipped} without image or "
                f"caption, {len(self.damaged)} tars damaged); a sample is NAME.jpg (jpeg, png, "
                "webp) and NAME.txt or NAME.json"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        """Read one sample. Raises IndexError, and BadSampleError if it cannot be had."""
        tar, row = self._locate(index)
        wanted = self._caption_members(row)
        image = _image(row)
        (headers, data), *others = self._read(tar, [image, *wanted.values()])
        captions, weights = self._captions(tar, row, dict(zip(wanted, others, strict=True)))
        return Record(data, captions, self._key(tar, headers), weights)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of `self[index]`, without reading the image. Raises as that does."""
        tar, row = self._locate(index)
        wanted = self._caption_members(row)
        found = self._read(tar, list(wanted.values())) if wanted else []
        return self._captions(tar, row, dict(zip(wanted, found, strict=True)))[0]

    def shard(self, index: int) -> str:
        """The tar of a sample."""
        return self._tars[self._locate(index)[0]]

    def locate(self, index: int) -> str:
        """Name a sample for messages: its tar and key. Works where the sample itself is broken."""
        tar, row = self._locate(index)
        first, block, _, _ = _image(row)
        try:
            ((headers, _),) = self._read(tar, [(first, block, 0, row[7])])
            return f"{self._tars[tar]}, key {self._key(tar, headers)}"
        except BadSampleError:
            return f"{self._tars[tar]}, byte {first * BLOCK}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}

    def _locate(self, index: int) -> tuple[int, _Row]:
        if not 0 <= index < self._ends[-1]:
            raise IndexError(f"sample {index} of {len(self)}")
        if self._rows is None:  # threads may both open it: either will do
            self._rows = _Rows(self._rows_file, len(self))
        return bisect_right(self._ends, index), self._rows[index]

    def _caption_members(self, row: _Row) -> dict[str, _Span]:
        """Those that are to be read, of the ones that the sample has."""
        wanted = {}
        if row[1] and self._reads_text:
            wanted["txt"] = (row[1] - 1, row[1], row[4], row[8])
        if row[2] and (self._reads_json or not (self._keys or wanted)):
            wanted["json"] = (row[2] - 1, row[2], row[5], row[9])
        return wanted

    def _captions(
        self, tar: int, row: _Row, members: dict[str, tuple[bytes, bytes]]
    ) -> tuple[tuple[str, ...], tuple[float, ...]]:
        text = members["txt"][1] if "txt" in members else None
        content = members["json"][1] if "json" in members else None
        try:
            return captions_of(text, content, self._keys, self._weights)
        except BadSampleError:
            if self._keys or content is not None or not row[2]:
                raise
        ((_, content),) = self._read(tar, [(row[2] - 1, row[2], row[5], row[9])])
        return captions_of(text, content)

    def _read(self, tar: int, spans: Sequence[_Span]) -> list[tuple[bytes, bytes]]:
        """Headers and data of members of a tar, in one read if they lie close together."""
        start = min([span[0] for span in spans]) * BLOCK
        end = max([span[1] * BLOCK + span[2] for span in spans])
        useful = sum([(span[1] - span[0]) * BLOCK + span[2] for span in spans])
        gap = _REMOTE_GAP if is_remote(self._tars[tar]) else _LOCAL_GAP
        if len(spans) > 1 and end - start - useful > gap:
            return [self._read(tar, [span])[0] for span in spans]
        try:
            buffer = self._files.read(tar, start, end - start)
        except BadSampleError as error:
            if isinstance(error.__cause__, NoRangesError):
                raise no_ranges(self._tars[tar]) from None
            raise
        members = []
        for first, block, num_bytes, check in spans:
            data = block * BLOCK - start
            if len(buffer) < data + num_bytes or zlib.crc32(buffer[data - BLOCK : data]) != check:
                raise BadSampleError(
                    "archive", f"{self._tars[tar]}: changed since it was indexed (byte {start})"
                )
            headers = buffer[first * BLOCK - start : data]
            members.append((headers, buffer[data : data + num_bytes]))
        return members

    def _key(self, tar: int, headers: bytes) -> str:
        """The key of the member with these headers."""
        try:
            name = short_name(headers) if len(headers) == BLOCK else first_name(headers)
        except TarError as error:  # a check of the header proper does not cover those before it
            message = f"{self._tars[tar]}: changed since it was indexed ({error.reason})"
            raise BadSampleError("archive", message) from None
        parts = split_name(name)
        return (parts[0] if parts else name).decode("utf-8", errors="replace")

    def _warn(self, gone: Sequence[str]) -> None:
        num_tars = len(self._tars)
        if self.num_skipped:
            message = "%s: %d samples without image or caption left out, %d kept"
            logger.warning(message, self.path, self.num_skipped, len(self))
        if self.damaged:
            message = "%s: %d of %d tars are damaged or were cut short, the first: %s: %s"
            logger.warning(message, self.path, len(self.damaged), num_tars, *self.damaged[0])
        if gone:
            message = "%s: %d of %d tars have gone since they were indexed, the first: %s"
            logger.warning(message, self.path, len(gone), num_tars, gone[0])


class _Rows:
    """The rows of an index file; see `ROW`. It closes with the last reference."""

    def __init__(self, file: Path, length: int) -> None:
        self._descriptor = os.open(file, os.O_RDONLY)
        size = os.fstat(self._descriptor).st_size
        self._start = size - length * ROW.size  # bytes of the .npy header
        self._map: mmap.mmap | None = None
        if size <= _MOST_MAPPED_BYTES:
            self._map = mmap.mmap(self._descriptor, size, prot=mmap.PROT_READ)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def __getitem__(self, index: int) -> _Row:
        start = self._start + index * ROW.size
        if self._map is not None:
            return ROW.unpack_from(self._map, start)
        return ROW.unpack(os.pread(self._descriptor, ROW.size, start))


def _image(row: _Row) -> _Span:
    return row[0] - row[6], row[0], row[3], row[7]
