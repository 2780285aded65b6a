"""The samples of a webdataset tar in sequence, from the byte offset of any of them.

Needs no index and asks for every byte once, in large ranges: the way to read a bucket. The samples
are those of `WebdatasetSource`, by the same rules.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from clip_jax.data.record import BadSampleError, Record
from clip_jax.data.sources.captions import captions_of
from clip_jax.data.sources.files import SequentialFile
from clip_jax.data.sources.tar_headers import Member, TarError, walk
from clip_jax.data.sources.tar_scan import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, split_name

END = -1  # in place of an offset: no sample comes after
_SKIP_BYTES = 2**20  # that are thrown away at a time


class TarSample(NamedTuple):
    """The members of one sample, as stored, and where the next one begins."""

    key: str
    image: bytes | None
    text: bytes | None
    json: bytes | None
    too_large: str  # names a member that was passed over
    after: int  # byte offset of the next sample, or END

    def record(self, keys: Sequence[str], weights: Sequence[float]) -> Record:
        """What the sample holds; see `captions_of` for the arguments. Raises BadSampleError."""
        if self.image is None:
            problem = self.too_large or "no image (jpg, jpeg, png, webp)"
            raise BadSampleError("image", problem)
        if self.text is None and self.json is None:
            raise BadSampleError("caption", self.too_large or "no txt or json")
        captions, probabilities = captions_of(self.text, self.json, keys, weights)
        return Record(self.image, captions, self.key, probabilities)


def tar_samples(file: SequentialFile) -> Iterator[TarSample]:
    """Yield the samples from where the file stands, which is 0 or the `after` of a sample.

    Raises BadSampleError("archive") where the tar is damaged or cut short, ("read") where it cannot
    be read on, each after the whole samples before it.
    """
    base = file.tell()
    feed = _Feed(file)
    sample = _Members(b"")
    try:
        if file.size == 0:
            raise TarError(0, "a tar of 0 bytes")
        for member in walk(feed, file.size - base):
            parts = split_name(member.name)
            if parts is None:
                continue
            if parts[0] != sample.key:
                if sample.extensions:
                    yield sample.finish(base + member.start)
                sample = _Members(parts[0])
            sample.add(parts[1], member, feed)
    except (TarError, BadSampleError) as error:
        if sample.is_whole():
            yield sample.finish(END)
        if isinstance(error, BadSampleError):
            raise
        message = f"{error.reason} at byte {base + error.offset}"
        raise BadSampleError("archive", message) from None
    if sample.extensions:
        yield sample.finish(END)


class _Feed:
    """The bytes of a file for `walk`, whose requests only go forward.

    Offsets are from where the file stood at first.
    """

    def __init__(self, file: SequentialFile) -> None:
        self._file = file
        self._base = file.tell()

    def __call__(self, num_bytes: int, offset: int) -> bytes:
        while (behind := offset - (self._file.tell() - self._base)) > 0:
            if not self._file.read(min(behind, _SKIP_BYTES)):
                return b""
        return self._file.read(num_bytes)


class _Members:
    """The members seen so far of one sample."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.extensions: set[bytes] = set()
        self._image: bytes | None = None
        self._text: bytes | None = None
        self._json: bytes | None = None
        self._too_large = ""

    def add(self, extension: bytes, member: Member, feed: _Feed) -> None:
        if extension in self.extensions:
            raise TarError(member.start, f"the name {member.name.decode(errors='replace')} twice")
        self.extensions.add(extension)
        is_image = extension in IMAGE_EXTENSIONS and self._image is None
        if not is_image and extension not in (b"txt", b"json"):
            return
        if member.size > MAX_MEMBER_BYTES:
            self._too_large = f"the {extension.decode()} has {member.size} bytes"
            return
        data = feed(member.size, member.data)
        if len(data) < member.size:
            reason = f"the file ends inside a member ({len(data)} of {member.size} bytes)"
            raise TarError(member.start, reason)
        if is_image:
            self._image = data
        elif extension == b"txt":
            self._text = data
        else:
            self._json = data

    def is_whole(self) -> bool:
        return self._image is not None and (self._text is not None or self._json is not None)

    def finish(self, after: int) -> TarSample:
        key = self.key.decode("utf-8", errors="replace")
        return TarSample(key, self._image, self._text, self._json, self._too_large, after)
