"""Which sample stands where: a pure function of the seed and the position.

Positions count the samples of a run globally from 0 to infinity. A run that knows how many it has
consumed can go on from there on any number of hosts and workers. The arithmetic is kept here
rather than taken from Grain (2026: its weights are rounded to 1%, its epoch e with seed s is epoch
e - 1 with seed s + 1, and it is free to change): a run must resume to the bit after an update.
"""

import bisect
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

    def places(self, positions: Sequence[int] | NDArray[np.int64]) -> list[Place]:
        """Where each of the positions leads, in their order. The time per position is constant."""
        numbers, counts = self._draws(np.asarray(positions, np.int64))
        rows = np.empty(len(counts), np.int64)
        epochs = np.empty(len(counts), np.int64)
        for number, name in enumerate(self._names):
            (slots,) = np.nonzero(numbers == number)
            epochs[slots], steps = np.divmod(counts[slots], self._lengths[name])
            for epoch in np.unique(epochs[slots]).tolist():
                members = epochs[slots] == epoch
                entropy = [self._seed, zlib.crc32(name.encode()), epoch]
                rows[slots[members]] = permute(
                    steps[members].astype(np.uint64), self._lengths[name], entropy
                )
        names = [self._names[number] for number in numbers.tolist()]
        return list(map(Place, names, epochs.tolist(), rows.tolist()))

    def drawn_before(self, position: int) -> dict[str, int]:
        """How many samples of each source come before a position."""
        drawn = {}
        here, rest = position, sum(self._shares)
        for name, share in zip(self._names, self._shares, strict=True):
            left = here * (rest - share) // rest
            drawn[name] = here - left
            here, rest = left, rest - share
        return drawn

    def first_repeat(self) -> int:
        """The first position that brings a sample a second time."""
        # Most positions that can pass without one are as many as there are samples.
        return bisect.bisect_left(
            range(1, sum(self._lengths[name] for name in self._names) + 1),
            True,
            key=lambda end: any(
                drawn > self._lengths[name] for name, drawn in self.drawn_before(end).items()
            ),
        )

    def _draws(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The number of the source at each position, and how many of its samples come before.

        The first source takes its share of the positions, evenly spread; the others share what is
        left in the same way. Exact in whole numbers at any position.
        """
        numbers = np.zeros(len(positions), np.int64)
        counts = np.zeros(len(positions), np.int64)
        rest = sum(self._shares)
        largest = int(positions.max(initial=0)) + 1
        # Python's integers where 64 bits are too few for the products.
        here = positions if largest * rest < 2**63 else positions.astype(object)
        after = here + 1
        for number, share in enumerate(self._shares):
            left_here = here * (rest - share) // rest
            left_after = after * (rest - share) // rest
            taken = (after - left_after > here - left_here).astype(bool)
            numbers[taken] = number
            counts[taken] = (here - left_here)[taken]
            here, after, rest = left_here, left_after, rest - share
        return numbers, counts


class Positions:
    """Counts of consumed samples to positions in the order, which pass over some ranges of it.

    skipped_ranges: of positions, [from, to), in any order; they may overlap.
    """

    def __init__(self, skipped_ranges: Sequence[tuple[int, int]]) -> None:
        merged: list[list[int]] = []
        for first, end in sorted(skipped_ranges):
            if merged and first <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([first, end])
        self._ranges = merged
        self._skipped = np.cumsum([0, *(end - first for first, end in merged)], dtype=np.int64)
        # The count at which a run comes to each range.
        firsts = np.array([first for first, _ in merged], np.int64)
        self._counts = firsts - self._skipped[:-1]

    def __call__(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions of the samples before which so many are consumed."""
        return counts + self._skipped[np.searchsorted(self._counts, counts, side="right")]

    def consumed_before(self, position: int) -> int:
        """How many samples a run consumes before it comes to a position."""
        skipped = sum(min(end, position) - min(first, position) for first, end in self._ranges)
        return position - skipped


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
