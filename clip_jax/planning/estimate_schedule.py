"""What of a program's communication its computation hides, by the order of its instructions."""

import dataclasses
import functools
from collections.abc import Callable

from clip_jax.planning.estimate_speeds import Speeds
from clip_jax.planning.hlo import COLLECTIVES, Collective, Instruction, operands
from clip_jax.planning.traffic import Reader


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """One collective in all its runs."""

    collective: Collective
    seconds: float
    hidden_seconds: float  # of them, behind work between its start and its done


class Schedule:
    """Goes through a program in its order: work takes time, and collectives hide behind it.

    seconds_of: of one run of a collective.
    """

    def __init__(
        self, reader: Reader, speeds: Speeds, seconds_of: Callable[[Collective], float]
    ) -> None:
        self._reader, self._program = reader, reader.program
        self._speeds, self._seconds_of = speeds, seconds_of
        self._hidden: dict[str, float] = {}  # of one run, by the collective's name
        self._by_name = {c.name: c for c in self._program.collectives if not c.channel}
        self._spread = self._find_spread()
        self.chip_seconds, _ = self._time(self._program.entry)

    @functools.cached_property
    def collectives(self) -> list[Timed]:
        return [
            Timed(
                collective=each,
                seconds=self._seconds_of(each) * each.times,
                hidden_seconds=self._hidden.get(each.name, 0.0) * each.times,
            )
            for each in self._program.collectives
        ]

    @functools.cache  # noqa: B019 - lives as long as the schedule
    def _time(self, name: str) -> tuple[float, float]:
        """Seconds of one run of a computation, and those behind which nothing hides."""
        computation = self._program.computations[name]
        order = list(computation.values())
        spent, free = [0.0] * len(order), [0.0] * len(order)
        for place, instruction in enumerate(order):
            for part, times in self._program.parts(instruction, computation):
                inner, inner_free = self._time(part)
                spent[place] += times * inner
                free[place] += times * inner_free
            work = self._reader.work_of(instruction, computation)
            if work is not None and instruction.opcode.removesuffix("-start") not in COLLECTIVES:
                spent[place] += self._speeds.seconds(work)
                free[place] += self._speeds.seconds(work)
        for collective, first, last in self._intervals(name, order):
            left = self._seconds_of(collective)
            for place in range(first, last + 1):
                hidden = min(left, free[place])
                free[place] -= hidden
                left -= hidden
            self._hidden[collective.name] = self._seconds_of(collective) - left
        return sum(spent), sum(free)

    def _intervals(self, name: str, order: list[Instruction]) -> list[tuple[Collective, int, int]]:
        """Collectives that go on while others compute: first and last of those."""
        found = list(self._spread.get(name, ()))
        begun: dict[str, tuple[Collective, int]] = {}
        for place, instruction in enumerate(order):
            if instruction.opcode.endswith("-start"):
                collective = self._begun_by(instruction)
                if collective is not None:
                    begun[instruction.name] = collective, place
            elif instruction.opcode.endswith(("-done", "-update")):
                start = operands(instruction)[0]
                if start not in begun:
                    continue
                collective, first = begun[start]
                if instruction.opcode.endswith("-update"):
                    begun[instruction.name] = begun[start]
                else:
                    found.append((collective, first + 1, place - 1))
        return found

    def _begun_by(self, start: Instruction) -> Collective | None:
        """That of a `-start`, or of the computation which an `async-start` calls."""
        if start.name in self._by_name:
            return self._by_name[start.name]
        if start.opcode != "async-start":
            return None
        (part, _), *_ = self._program.parts(start, {})
        inside = self._program.computations[part]
        return next((self._by_name[name] for name in inside if name in self._by_name), None)

    def _find_spread(self) -> dict[str, list[tuple[Collective, int, int]]]:
        """By computation, what TPUs spread over its fusions: from the first to the last of them."""
        places: dict[str, dict[str, list[int]]] = {}
        by_channel = {c.channel: c for c in self._program.collectives if c.channel}
        for name in self._reader.times:
            for place, instruction in enumerate(self._program.computations[name].values()):
                for channel in self._channels(instruction):
                    places.setdefault(channel, {}).setdefault(name, []).append(place)
        found: dict[str, list[tuple[Collective, int, int]]] = {}
        for channel, by_computation in places.items():
            if channel not in by_channel:
                continue
            # As often as the collective runs: inner loops run shares of it.
            name = min(by_computation, key=lambda name: self._reader.times[name])
            inside = by_computation[name]
            found.setdefault(name, []).append((by_channel[channel], min(inside), max(inside)))
        return found

    def _channels(self, instruction: Instruction) -> set[str]:
        """Of the collectives inside a fusion."""
        if instruction.opcode != "fusion":
            return set()
        found = set()
        for inner in self._program.called(instruction).values():
            if inner.opcode.removesuffix("-start") in COLLECTIVES:
                found.add(inner.channel)
            found |= self._channels(inner)
        return found
