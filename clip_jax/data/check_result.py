"""The result of `clip-jax data check` for one source."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from clip_jax.data.distribution import Distribution
from clip_jax.data.duplicates import Groups
from clip_jax.data.record import BadReason


class BadSample(NamedTuple):
    """A sample that cannot be used."""

    row: int
    reason: BadReason
    message: str
    shard: str
    name: str  # for messages


@dataclass
class Examples:
    """Rows to show of one kind, those that stand out most first."""

    title: str
    rows: list[int] = field(default_factory=list)


class CommonCaption(NamedTuple):
    """A first caption that several samples have."""

    text: str
    num_samples: int
    row: int  # the first of them


class PackingFigures(NamedTuple):
    """What packing captions several to a row would take; see `data.packing`."""

    group_size: int  # captions
    rows: int  # of a group: the fewest that cut at most 1e-4 of the captions


@dataclass
class SourceCheck:
    """What was found; all figures are of the samples that were checked, evenly spread.

    Lengths in tokens include start and end. Byte sizes have three digits. Members of groups are
    rows of the source.
    """

    name: str
    num_samples: int  # that the source has
    num_checked: int
    context_length: int
    image_size: int  # pixels, of the image tower
    schema: list[str] = field(default_factory=list)  # a line for each thing that files hold
    seconds: float = 0.0
    shard_sizes: Distribution = field(default_factory=Distribution)  # samples, of all shards
    num_skipped: int = 0  # samples without image or caption, which the source leaves out
    damaged: list[str] = field(default_factory=list)  # files that end early, and why
    num_usable: int = 0
    num_bad: Counter[str] = field(default_factory=Counter)  # by reason
    bad_by_shard: Counter[str] = field(default_factory=Counter)
    bad_samples: list[BadSample] = field(default_factory=list)  # the first of each reason
    widths: Distribution = field(default_factory=Distribution)
    heights: Distribution = field(default_factory=Distribution)
    shorter_sides: Distribution = field(default_factory=Distribution)
    aspects: Distribution = field(default_factory=lambda: Distribution(scale=100))  # width / height
    num_bytes: Distribution = field(default_factory=Distribution)  # of an image
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)  # Pillow's names: RGB, L, CMYK, P...
    captions_per_image: Distribution = field(default_factory=Distribution)
    characters: Distribution = field(default_factory=Distribution)  # of a caption
    words: Distribution = field(default_factory=Distribution)
    tokens: Distribution = field(default_factory=Distribution)
    packing: PackingFigures | None = None  # None: not asked, or no end of text
    suspicious: Counter[str] = field(default_factory=Counter)  # captions, by what they look like
    equal_images: Groups = field(default_factory=Groups)  # byte by byte
    look_alikes: Groups = field(default_factory=Groups)  # of images that are not equal
    equal_captions: Groups = field(default_factory=Groups)  # first captions
    common_captions: list[CommonCaption] = field(default_factory=list)
    examples: list[Examples] = field(default_factory=list)

    @property
    def share_cut(self) -> float:
        """Of the captions: those with more tokens than context_length."""
        return self.tokens.num_above(self.context_length) / max(1, len(self.tokens))

    @property
    def share_padding(self) -> float:
        """Of the tokens of rows with one caption each."""
        if not len(self.tokens):
            return 0.0
        filled = sum(min(length, self.context_length) for length in self.tokens)
        return 1 - filled / (len(self.tokens) * self.context_length)
