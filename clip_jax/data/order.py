"""Which sample stands where: a pure function of the seed and the position.

Positions count the samples of a run globally from 0 to infinity. A run that knows how many it has
consumed can go on from there on any number of hosts and workers. The arithmetic is kept here
rather than taken from Grain (2026: its weights are rounded to 1%, its epoch e with seed s is epoch
e - 1 with seed s + 1, and it is free to change): a run must resume to the bit after an update.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_jax.config.errors import UserError

_ROUNDS = 6  # of the Feistel network; 4 make a permutation pseudo-random (Luby & Rackoff 1988)


class Place(NamedTuple):
    """Where a position leads."""

    source: str
    epoch: int  # of this source: how often it has been gone through before
    row: int  # in the source


class SampleOrder:
    """A weighted mixture of sources, each shuffled anew in each of its epochs.

    lengths: samples of each source. weights: share of each in the mixture, in any unit; the shares
    hold exactly over every window of the (reduced) sum of weights. Every sample of a source comes
    once before one comes again. The order of the names does not matter.

    Raises UserError if a weight is negative or none is positive.
    """

    def __init__(self, lengths: Mapping[str, int], weights: Mapping[str, float], seed: int) -> None:
        for name, weight in weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise UserError(f"weight {weight} of data source '{name}' is not 0 or more")
        # By name: a config that was saved and read again may list its sources in another order.
        self._names = sorted(name for name in lengths if weights[name] > 0)
        if not self._names:
            raise UserError("no data source with a weight above 0; add one to data.sources")
        self._lengths = lengths
        # repr() of 0.1 is "0.1": the fraction meant, not the binary one nearest to it.
        exact = [Fraction(repr(float(weights[name]))) for name in self._names]
        denominator = math.lcm(*(share.denominator for share in exact))
        shares = [int(share * denominator) for share in exact]
        divisor = math.gcd(*shares)
        self._shares = [share // divisor for share in shares]
        self._seed = seed

    def places(self, positions: Sequence[int]) -> list[Place]:
        """Where each of the positions leads, in their order. The time per position is constant."""
        drawn = [self._draw(position) for position in positions]
        places: list[Place | None] = [None] * len(drawn)
        groups: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for slot, (name, count) in enumerate(drawn):
            epoch, step = divmod(count, self._lengths[name])
            groups.setdefault((name, epoch), []).append((slot, step))
        for (name, epoch), members in groups.items():
            steps = np.array([step for _, step in members], np.uint64)
            entropy = [self._seed, zlib.crc32(name.encode()), epoch]
            rows = permute(steps, self._lengths[name], entropy).tolist()
            for (slot, _), row in zip(members, rows, strict=True):
                places[slot] = Place(name, epoch, row)
        return [place for place in places if place is not None]

    def _draw(self, position: int) -> tuple[str, int]:
        """The source at a position and how many of its samples come before.

        The first source takes its share of the positions, evenly spread; the others share what is
        left in the same way. Exact in whole numbers at any position.
        """
        here, after = position, position + 1
        rest = sum(self._shares)
        for name, share in zip(self._names, self._shares, strict=True):
            left_here = here * (rest - share) // rest
            left_after = after * (rest - share) // rest
            if after - left_after > here - left_here:
                return name, here - left_here
            here, after, rest = left_here, left_after, rest - share
        raise AssertionError("the last source takes all that is left")


def permute(values: NDArray[np.uint64], length: int, entropy: Sequence[int]) -> NDArray[np.uint64]:
    """Map distinct values in [0, length) to distinct values in [0, length), without a table.

    A Feistel network over the next power of four; results outside the range go through it again
    until they fall inside (cycle walking, Black & Rogaway 2002).
    """
    half_bits = max(1, math.ceil((length - 1).bit_length() / 2))
    half = np.uint64(half_bits)
    mask = np.uint64(2**half_bits - 1)
    keys = np.random.SeedSequence(entropy).generate_state(_ROUNDS, np.uint64)
    permuted = values.copy()
    outside = np.ones(len(values), bool)
    while outside.any():
        current = permuted[outside]
        left, right = current >> half, current & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        permuted[outside] = (left << half) | right
        outside = permuted >= length
    return permuted


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
