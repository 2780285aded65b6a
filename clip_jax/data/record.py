"""What a source hands out."""

from typing import NamedTuple


class Record(NamedTuple):
    """One image with its captions, as stored: nothing is decoded yet."""

    image: bytes  # an encoded file: JPEG, PNG or WebP
    captions: tuple[str, ...]  # at least one; the first is the canonical one
    key: str  # the sample's name within its tar
