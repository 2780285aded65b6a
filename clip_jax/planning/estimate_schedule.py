"""What of a program's communication its computation hides, by the order of its instructions."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

from clip_jax.planning.estimate_speeds import Speeds
from clip_jax.planning.hlo import COLLECTIVES, Collective, Instruction, operands
from clip_jax.planning.hlo_slices import rendezvous
from clip_jax.planning.traffic import Computation, Reader, Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """One collective in all its runs."""

    collective: Collective
    seconds: float
    hidden_seconds: float  # of them, behind work between its start and its done


@dataclasses.dataclass(kw_only=True)
class Spent:
    """Seconds of one device on its own work, by what each instruction waits for."""

    computing: float = 0.0
    moving: float = 0.0  # to and from memory
    launching: float = 0.0
    unhidden: float = 0.0  # behind which no collective hides
    idle_memory: float = 0.0  # in which the memory has nothing to do

    @property
    def total(self) -> float:
        return self.computing + self.moving + self.launching

    def add(self, other: "Spent", times: int = 1) -> None:
        for field in dataclasses.fields(self):
            more = times * getattr(other, field.name)
            setattr(self, field.name, getattr(self, field.name) + more)


class _Span(NamedTuple):
    """What goes on while others compute: its start, and the places of the first and last."""

    start: Instruction
    first: int
    last: int


class Schedule:
    """Goes through a program in its order: work takes time, and collectives hide behind it.

    Copies that are started and waited for hide behind work that leaves the memory idle.
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
        self.spent = self._time(self._program.entry)

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

    @property
    def serial_seconds(self) -> float:
        """The work of a step where copies hide behind nothing."""
        return sum(
            times * self._speeds.seconds(work)
            for work, times in self._reader.work()
            if not _is_collective(work.opcode)
        )

    @functools.cache  # noqa: B019 - lives as long as the schedule
    def _time(self, name: str) -> Spent:
        """Of one run of a computation."""
        computation = self._program.computations[name]
        order = list(computation.values())
        spans = self._spans(order, computation)
        copying = {
            span.start.name: seconds
            for span in spans
            if (seconds := self._copying(span.start, computation)) is not None
        }
        spent = [Spent() for _ in order]
        for here, instruction in zip(spent, order, strict=True):
            if instruction.name in copying:
                continue
            for part, times in self._program.parts(instruction, computation):
                here.add(self._time(part), times)
            work = self._reader.work_of(instruction, computation)
            if work is not None and not _is_collective(work.opcode):
                here.add(self._of(work))
        for start, first, last in spans:
            if start.name in copying:
                left = copying[start.name]
                for here in spent[first : last + 1]:
                    hidden = min(left, here.idle_memory)
                    here.idle_memory -= hidden
                    left -= hidden
                spent[last + 1].add(Spent(moving=left, unhidden=left))
        crossing = list(self._spread.get(name, ()))
        for start, first, last in spans:
            if (collective := self._begun_by(start)) is not None:
                crossing.append((collective, first, last))
        for collective, first, last in crossing:
            left = self._seconds_of(collective)
            for here in spent[first : last + 1]:
                hidden = min(left, here.unhidden)
                here.unhidden -= hidden
                left -= hidden
            self._hidden[collective.name] = self._seconds_of(collective) - left
        whole = Spent()
        for here in spent:
            whole.add(here)
        return whole

    def _of(self, work: Work) -> Spent:
        computing, moving = self._speeds.computing(work), self._speeds.moving(work)
        seconds = self._speeds.seconds(work)
        return Spent(
            computing=computing if computing > moving else 0.0,
            moving=moving if computing <= moving else 0.0,
            launching=self._speeds.kernel_seconds,
            unhidden=seconds,
            idle_memory=seconds - moving,
        )

    def _copying(self, start: Instruction, computation: Computation) -> float | None:
        """Seconds of a copy that goes on beside other work; None of what is no copy."""
        inside = [self._time(part) for part, _ in self._program.parts(start, computation)]
        if self._begun_by(start) is not None or any(each.computing for each in inside):
            return None
        work = self._reader.work_of(start, computation)
        own = 0.0 if work is None else self._speeds.moving(work)
        return own + sum(each.moving for each in inside)

    def _spans(self, order: list[Instruction], computation: Computation) -> list[_Span]:
        found = []
        begun: dict[str, tuple[Instruction, int]] = {}
        for place, instruction in enumerate(order):
            if instruction.opcode.endswith("-start"):
                begun[instruction.name] = instruction, place
            elif instruction.opcode == "send" and instruction.name in self._by_name:
                begun[rendezvous(instruction.text)] = instruction, place
            elif instruction.opcode.endswith(("-done", "-update")):
                name = operands(instruction)[0]
                if instruction.opcode == "recv-done" and name in computation:
                    name = rendezvous(computation[name].text)
                if name not in begun:
                    continue
                if instruction.opcode.endswith("-update"):
                    begun[instruction.name] = begun[name]
                else:
                    start, first = begun[name]
                    found.append(_Span(start, first + 1, place - 1))
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
            if _is_collective(inner.opcode):
                found.add(inner.channel)
            found |= self._channels(inner)
        return found


def _is_collective(opcode: str) -> bool:
    return opcode.removesuffix("-start") in COLLECTIVES
