"""How much a program holds at once, from the order of its instructions."""

import re
from collections.abc import Callable
from typing import NamedTuple

from clip_jax.planning.hlo import Instruction, Program, operands
from clip_jax.planning.hlo_arrays import DEVICE, Array
from clip_jax.planning.hlo_fusions import Inside

_INDEX = re.compile(r"index=(\d+)")

Computation = dict[str, Instruction]


class _Buffer(NamedTuple):
    number: int
    size: int  # 0: of the caller, or left out


def peak_bytes(program: Program, leave_out: Callable[[Array], bool] | None = None) -> int:
    """The most that is held at once of what the program makes, arguments and results left out.

    leave_out: arrays that count nothing. Without the gaps of a real allocation, and with what goes
    into an instruction and comes out of it held together, so some percent off: its differences are
    what it is for.
    """
    return _Held(program, leave_out).peak(program.entry)


class _Held:
    def __init__(self, program: Program, leave_out: Callable[[Array], bool] | None) -> None:
        self._program, self._leave_out = program, leave_out
        self._num_buffers = 0

    def peak(self, name: str) -> int:
        computation = self._program.computations[name]
        leaves: dict[str, list[_Buffer]] = {}
        last: dict[_Buffer, int] = {}
        inner: list[int] = []
        made: list[set[_Buffer]] = []
        known: set[_Buffer] = set()
        for place, instruction in enumerate(computation.values()):
            found = self._leaves(instruction, computation, leaves)
            leaves[instruction.name] = found
            made.append(set(found) - known)
            known.update(found)
            parts = self._program.parts(instruction, computation)
            inner.append(max((self.peak(part) for part, _ in parts), default=0))
            # A name for an array keeps nothing alive: whoever uses the name does.
            if instruction.opcode not in ("tuple", "get-tuple-element", "bitcast"):
                for operand in _operands(instruction, computation):
                    last.update(dict.fromkeys(leaves[operand], place))
            last.update(dict.fromkeys(made[-1], place))
        root = next(i.name for i in computation.values() if i.is_root)
        results = set(leaves[root])
        ends: dict[int, list[_Buffer]] = {}
        for buffer, place in last.items():
            ends.setdefault(place, []).append(buffer)
        held = most = 0
        for place, new in enumerate(made):
            held += sum(buffer.size for buffer in new if buffer not in results)
            most = max(most, held + inner[place])
            held -= sum(buffer.size for buffer in ends.get(place, ()) if buffer not in results)
        return most

    def _leaves(
        self, instruction: Instruction, computation: Computation, leaves: dict[str, list[_Buffer]]
    ) -> list[_Buffer]:
        """The buffers of an instruction's arrays, in order."""
        opcode, names = instruction.opcode, _operands(instruction, computation)
        if opcode in ("parameter", "constant"):
            return [self._buffer(0) for _ in instruction.arrays]
        if opcode == "tuple":
            return [leaf for name in names for leaf in leaves[name]]
        if opcode == "get-tuple-element":
            index = _INDEX.search(instruction.text.rsplit(")", 1)[-1]) or _INDEX.search(
                instruction.text
            )
            whole = leaves[names[0]]
            assert index is not None, instruction.text
            flat = len(instruction.arrays) == 1 and int(index[1]) < len(whole)
            return [whole[int(index[1])]] if flat else whole
        if opcode in ("bitcast", "while", "opt-barrier") or opcode.endswith("-done"):
            return [leaf for name in names for leaf in leaves[name]]
        if opcode.startswith("dynamic-update-slice"):
            return leaves[names[0]]
        updated: list[int | None] = [None] * len(instruction.arrays)
        if opcode == "fusion":
            updated = Inside(self._program, self._program.called(instruction)).updated()
        found = []
        for array, operand in zip(instruction.arrays, updated, strict=False):
            if operand is not None and len(leaves[names[operand]]) == 1:
                found += leaves[names[operand]]
            else:
                found.append(self._buffer(self._size(array)))
        return found

    def _size(self, array: Array) -> int:
        left_out = self._leave_out is not None and self._leave_out(array)
        return 0 if left_out or array.space != DEVICE else array.padded_bytes

    def _buffer(self, size: int) -> _Buffer:
        self._num_buffers += 1
        return _Buffer(self._num_buffers, size)


def _operands(instruction: Instruction, computation: Computation) -> list[str]:
    return [name for name in operands(instruction) if name in computation]
