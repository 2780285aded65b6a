"""Which samples are the same: byte by byte, or to the eye.

A sample costs 8 bytes for each question asked of it: its hash.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Hashes = NDArray[np.uint64]

# The difference hash compares 8 x 8 neighbours. Copies at another size or quality mostly differ in
# 0 to 3 of the 64 bits, unrelated photographs in 32 (half) give or take 8.
_HASH_SIDE = 8
_NUM_BITS = 64
MAX_DIFFERENT_BITS = 3
_NEIGHBORS = 8  # compared with each hash in each sorted order

_MOST_GROUPS = 6  # that are listed
_MOST_MEMBERS = 8  # of each

UNCOMPARED = 0  # the hash of a picture that has next to no structure from left to right
_FEWEST_BITS = 8  # set and not set: with fewer, icons on a plain ground all look alike


class Group(NamedTuple):
    """The places of one value."""

    size: int
    members: list[int]  # positions of the first of them


class Groups(NamedTuple):
    """Values that occur more than once."""

    num_groups: int = 0
    num_extra: int = 0  # members beyond the first of each group: what would go if one were kept
    largest: tuple[Group, ...] = ()


def digest(data: bytes) -> int:
    """64 bits of a cryptographic hash: among a million samples two collide once in 37 million."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def difference_hash(picture: Image.Image) -> int:
    """64 bits, each whether a place of the picture is brighter than its left neighbour.

    dHash (Krawetz 2013, "Kind of Like That"). UNCOMPARED where there is little to tell by: one
    color, bands from side to side, a single edge.
    """
    size = (_HASH_SIDE + 1, _HASH_SIDE)
    gray = np.asarray(picture.convert("L").resize(size, Image.Resampling.BILINEAR)).astype(np.int16)
    bits = gray[:, 1:] > gray[:, :-1]
    if not _FEWEST_BITS <= bits.sum() <= _NUM_BITS - _FEWEST_BITS:
        return UNCOMPARED
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def equal_groups(values: Hashes) -> Groups:
    """The groups of equal values."""
    if not len(values):
        return Groups()
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=~values[order[:1]]))
    counts = np.diff(starts, append=len(values))
    repeated = np.flatnonzero(counts > 1)
    # Of groups as large as each other the one that comes first.
    ranked = sorted(repeated.tolist(), key=lambda g: (-int(counts[g]), int(order[starts[g]])))
    largest = [
        Group(int(counts[g]), order[starts[g] :][: min(counts[g], _MOST_MEMBERS)].tolist())
        for g in ranked[:_MOST_GROUPS]
    ]
    return Groups(len(repeated), int((counts - 1).sum()), tuple(largest))


def look_alike_groups(hashes: Hashes) -> Groups:
    """The groups of pictures that are joined by hashes at most MAX_DIFFERENT_BITS bits apart.

    Of two such hashes one of four quarters is equal: sorted by that quarter they lie near each
    other, and each is compared with its next neighbours. So of very large groups some pairs are
    not found; that every member is joined to some other is enough.
    """
    positions = np.flatnonzero(hashes != UNCOMPARED)
    pairs = [np.empty((0, 2), np.int64)]
    quarter = _NUM_BITS // (MAX_DIFFERENT_BITS + 1)
    for turn in range(0, _NUM_BITS, quarter):
        kept = hashes[positions]
        turned = (kept << np.uint64(turn)) | (kept >> np.uint64((_NUM_BITS - turn) % _NUM_BITS))
        order = np.argsort(turned, kind="stable")
        for step in range(1, min(_NEIGHBORS + 1, len(order))):
            apart = np.bitwise_count(turned[order[step:]] ^ turned[order[:-step]])
            near = np.flatnonzero(apart <= MAX_DIFFERENT_BITS)
            pairs.append(np.stack([positions[order[near]], positions[order[near + step]]], axis=1))
    return equal_groups(_components(len(hashes), np.concatenate(pairs)))


def _components(count: int, pairs: NDArray[np.int64]) -> Hashes:
    """The smallest number that each of `count` nodes is connected with."""
    labels = np.arange(count)
    while True:
        before = labels.copy()
        smaller = labels[pairs].min(axis=1)
        for end in range(2):
            np.minimum.at(labels, pairs[:, end], smaller)
        labels = labels[labels]
        if (labels == before).all():
            return labels.astype(np.uint64)
