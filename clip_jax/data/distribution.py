"""Counts of the values that something took: exact percentiles in little memory."""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple


class Bin(NamedTuple):
    """How many values lie in [low, high]."""

    low: float
    high: float
    num: int


class Distribution:
    """Values of one quantity, each rounded to a multiple of 1 / scale and counted.

    Its memory grows with the distinct values alone, so that it takes any number of samples.
    """

    def __init__(self, scale: int = 1) -> None:
        self._scale = scale
        self._counts = Counter[int]()

    def add(self, value: float) -> None:
        self._counts[round(value * self._scale)] += 1

    def __len__(self) -> int:
        return self._counts.total()

    def __iter__(self) -> Iterator[float]:
        """Every value as often as it was added, in ascending order."""
        for value in sorted(self._counts):
            yield from itertools.repeat(value / self._scale, self._counts[value])

    @property
    def mean(self) -> float:
        """Raises ValueError of an empty distribution, as do the next ones."""
        self._check_filled()
        total = sum(value * count for value, count in self._counts.items())
        return total / len(self) / self._scale

    @property
    def smallest(self) -> float:
        return self.percentile(0)

    @property
    def largest(self) -> float:
        return self.percentile(100)

    def percentile(self, percent: float) -> float:
        """The smallest value that at least so many percent of all values do not exceed."""
        self._check_filled()
        wanted, seen = percent / 100 * len(self), 0
        for value in sorted(self._counts):
            seen += self._counts[value]
            if seen >= wanted:
                break
        return value / self._scale

    def num_below(self, limit: float) -> int:
        return sum(count for value, count in self._counts.items() if value < limit * self._scale)

    def num_above(self, limit: float) -> int:
        return sum(count for value, count in self._counts.items() if value > limit * self._scale)

    def bins(self, most: int) -> list[Bin]:
        """At most so many bins of equal width; the last also holds the highest 1% of the values."""
        if not self._counts:
            return []
        low = min(self._counts)
        width = -(-(round(self.percentile(99) * self._scale) - low + 1) // most)
        counts = Counter[int]()
        for value, count in self._counts.items():
            counts[min((value - low) // width, most - 1)] += count
        last = max(counts)
        ends = [low + (number + 1) * width - 1 for number in range(last)] + [max(self._counts)]
        return [
            Bin((low + number * width) / self._scale, ends[number] / self._scale, counts[number])
            for number in range(last + 1)
        ]

    def summary(self) -> dict[str, float]:
        """Mean and percentiles by name; nothing of an empty distribution."""
        if not self._counts:
            return {}
        percents = {f"p{percent}": self.percentile(percent) for percent in (1, 5, 50, 95, 99)}
        ends = {"smallest": self.smallest, "largest": self.largest}
        return {"num": len(self), "mean": self.mean, **ends, **percents}

    def _check_filled(self) -> None:
        if not self._counts:
            raise ValueError("no value was added")
