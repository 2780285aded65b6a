"""Counts FLOPs and traffic in a compiled program's text, with the trip counts of its loops.

XLA's own cost analysis counts a loop's body once; the loss is nothing but loops.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=\{?%?([\w.\-, %]+)\}?")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)')
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f64": 8, "s64": 8, "u64": 8}
COLLECTIVES = ("collective-permute", "all-reduce", "all-gather", "reduce-scatter", "all-to-all")


@dataclasses.dataclass
class Instruction:
    name: str
    opcode: str
    shapes: list[tuple[str, tuple[int, ...]]]  # of the result
    text: str

    @property
    def num_bytes(self) -> int:
        return sum(_BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in self.shapes)


@dataclasses.dataclass
class Counts:
    """Of one device, over the whole run of the program."""

    flops: int = 0  # of matrix products
    collective_bytes: Counter[str] = dataclasses.field(default_factory=Counter)  # received
    collective_calls: Counter[str] = dataclasses.field(default_factory=Counter)
    largest_array: int = 0  # elements, of any instruction
    largest_collective: int = 0  # elements


class Program:
    """The computations of `compiled.as_text()`."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self.computations.setdefault(match[2], {})
                self.entry = match[2] if match[1] else self.entry
            elif match := _INSTRUCTION.match(line):
                instruction = _parse(match[1], match[2])
                current[match[1]] = instruction

    def instructions(self) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
        """Each instruction with its computation and how often it runs."""
        stack = [(self.entry, 1)]
        while stack:
            name, times = stack.pop()
            computation = self.computations[name]
            for instruction in computation.values():
                yield instruction, computation, times
                inner = times
                if instruction.opcode == "while":
                    inner = times * self._trip_count(instruction, computation)
                for called in _CALLED.findall(instruction.text):
                    for part in called.replace("%", "").split(","):
                        if part.strip() in self.computations:
                            stack.append((part.strip(), inner))

    def _trip_count(self, loop: Instruction, computation: dict[str, Instruction]) -> int:
        if trips := _TRIPS.search(loop.text):
            return int(trips[1])
        # TPU programs do not note it: read `counter < constant` and the counter's start.
        name = re.search(r"condition=%?([\w.\-]+)", loop.text)
        assert name is not None
        condition = self.computations[name[1]]
        test = next(i for i in condition.values() if i.opcode == "compare")
        counter, limit = _operands(test)
        index = re.search(r"get-tuple-element\(.*?\), index=(\d+)", condition[counter].text)
        assert index is not None
        assert "direction=LT" in test.text
        start = computation[_operands(loop)[0]]  # the tuple of what the loop carries
        return _constant(limit, condition) - _constant(_operands(start)[int(index[1])], computation)

    def counts(self) -> Counts:
        counts = Counts()
        for instruction, computation, times in self.instructions():
            elements = max((math.prod(shape) for _, shape in instruction.shapes), default=0)
            if instruction.opcode != "tuple":
                counts.largest_array = max(counts.largest_array, elements)
            counts.flops += times * _product_flops(instruction, computation)
            opcode = instruction.opcode.removesuffix("-start")
            if opcode in COLLECTIVES and not instruction.opcode.endswith("-done"):
                # A start's result is a tuple that repeats its operand: one copy is what moves.
                started = instruction.opcode.endswith("-start") and opcode == "collective-permute"
                shapes = instruction.shapes[:1] if started else instruction.shapes
                moved = dataclasses.replace(instruction, shapes=shapes).num_bytes
                counts.collective_bytes[opcode] += times * moved
                counts.collective_calls[opcode] += times
                counts.largest_collective = max(counts.largest_collective, elements)
        return counts

    def overlapped_permutes(self) -> tuple[int, int]:
        """(block-sized permutes with a product between start and done, all block-sized permutes).

        The order of instructions is the schedule. "Product": a loop or a fusion that holds one.
        """
        hidden = total = 0
        for computation in self.computations.values():
            order = list(computation.values())
            place = {instruction.name: i for i, instruction in enumerate(order)}
            for done in order:
                if done.opcode != "collective-permute-done" or len(done.shapes[0][1]) < 2:
                    continue
                operand = re.search(r"collective-permute-done\(.*?%?([\w.\-]+)\)", done.text)
                assert operand is not None, done.text
                between = order[place[operand[1]] + 1 : place[done.name]]
                total += 1
                hidden += any(self._has_product(i, computation) for i in between)
        return hidden, total

    def _has_product(self, instruction: Instruction, computation: dict[str, Instruction]) -> bool:
        if _product_flops(instruction, computation):
            return True
        return any(
            self._has_product(inner, self.computations[part])
            for called in _CALLED.findall(instruction.text)
            for part in called.replace("%", "").replace(" ", "").split(",")
            if part in self.computations
            for inner in self.computations[part].values()
        )


def _parse(name: str, text: str) -> Instruction:
    opcode = _OPCODE.search(text)
    result = text[: opcode.start(1)] if opcode else text
    shapes = [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _ARRAY.findall(result)
    ]
    return Instruction(name, opcode[1] if opcode else "", shapes, text)


def _operands(instruction: Instruction) -> list[str]:
    inside = instruction.text.split(f" {instruction.opcode}(", 1)[1].split(")", 1)[0]
    inside = re.sub(r"/\*.*?\*/", "", inside)
    return [part.strip().split(" ")[-1].lstrip("%") for part in inside.split(",")]


def _constant(name: str, computation: dict[str, Instruction]) -> int:
    instruction = computation[name]
    if instruction.opcode in ("copy", "bitcast"):
        return _constant(_operands(instruction)[0], computation)
    assert instruction.opcode == "constant", instruction.text
    return int(_operands(instruction)[0])


def _product_flops(instruction: Instruction, computation: dict[str, Instruction]) -> int:
    if instruction.opcode == "dot":
        left = computation[_operands(instruction)[0]].shapes[0][1]
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        assert dims is not None
        contracted = math.prod(left[int(d)] for d in dims[1].split(",") if d)
        return 2 * math.prod(instruction.shapes[0][1]) * contracted
    if instruction.opcode == "convolution":
        labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.text)
        assert labels is not None
        right = computation[_operands(instruction)[1]].shapes[0][1]
        contracted = math.prod(
            size for label, size in zip(labels[1], right, strict=True) if label != "o"
        )
        return 2 * math.prod(instruction.shapes[0][1]) * contracted
    return 0
