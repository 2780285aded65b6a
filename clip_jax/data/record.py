"""What a source hands out."""

from typing import Literal, NamedTuple, Protocol

# Why a sample cannot be used. read: its storage fails or its file is gone; archive: the file that
# holds it is damaged; image: it does not decode; caption: there is none, or it is not text.
BadReason = Literal["read", "archive", "image", "caption"]
BAD_REASONS: tuple[BadReason, ...] = ("read", "archive", "image", "caption")


class BadSampleError(ValueError):
    """A sample that cannot be used, and why."""

    def __init__(self, reason: BadReason, message: str) -> None:
        super().__init__(message)
        self.reason: BadReason = reason

    def __reduce__(self) -> tuple[type["BadSampleError"], tuple[BadReason, str]]:
        return BadSampleError, (self.reason, str(self))


class Record(NamedTuple):
    """One image with its captions, as stored: nothing is decoded yet."""

    image: bytes  # an encoded file: JPEG, PNG or WebP
    captions: tuple[str, ...]  # at least one; the first is the canonical one
    key: str  # the sample's name, unique within its shard
    weights: tuple[float, ...] = ()  # of the captions, in any unit; (): `SourceConfig.captions`


class Source(Protocol):
    """Random access to records; picklable and cheap to open in a worker; threads may share it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises BadSampleError where it cannot be had, after the retries."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of `self[index]`, without reading the image. Raises as that does."""
        ...

    def shard(self, index: int) -> str:
        """The file that holds a sample, or what comes nearest; reads nothing."""
        ...

    def locate(self, index: int) -> str:
        """Name a sample for messages, also where reading it fails."""
        ...
