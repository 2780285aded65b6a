"""Reads collectives and FLOPs out of a compiled program's text, with the trip counts of its loops.

XLA's own cost analysis counts a loop's body once. The text is that of `compiled.as_text()`, for
CPUs, TPUs and GPUs: the program of one device.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from clip_jax.planning.hlo_arrays import Array, arrays_of, dtype_bytes
from clip_jax.planning.hlo_groups import device_groups
from clip_jax.planning.hlo_products import (
    CUDNN_CONVOLUTION,
    convolution_flops,
    cudnn_flops,
    dot_flops,
    gemm_flops,
)
from clip_jax.planning.hlo_slices import Slices, crossing_kind, crossing_origin

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=\{?%?([\w.\-, %]+)\}?")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)')
_INDEX = re.compile(r"get-tuple-element\(.*?\), index=(\d+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of the result
    text: str
    is_root: bool = False  # what its computation returns

    @functools.cached_property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Of the result: dtype and dims."""
        return [(array.dtype, array.dims) for array in self.arrays]

    @property
    def num_bytes(self) -> int:
        return sum(array.num_bytes for array in self.arrays)

    @property
    def channel(self) -> str:
        """Of a collective; '' where it has none."""
        match = _CHANNEL.search(self.text)
        return match[1] if match else ""

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from; '' where XLA made it up."""
        match = _OP_NAME.search(self.text)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program, as often as it runs."""

    kind: str  # one of COLLECTIVES
    name: str
    op_name: str
    # Of the whole array on one device: what a gather makes, what a reduction or exchange takes.
    num_bytes: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of its operands
    groups: tuple[tuple[int, ...], ...]  # devices by their place in the mesh, flat
    times: int
    channel: str = ""  # what the copies share that are spread over fusions; '' for others

    @property
    def num_elements(self) -> int:
        """Of the largest operand."""
        return max(math.prod(dims) for _, dims in self.shapes)

    @property
    def group_size(self) -> int:
        return max((len(group) for group in self.groups), default=1)

    @property
    def sent_bytes(self) -> int:
        """What a device sends in all runs of it, by the algorithms that send least."""
        if self.kind == "collective-permute":
            return self.times * self.num_bytes if self.groups else 0
        share = self.num_bytes * (self.group_size - 1) // self.group_size
        return self.times * share * (2 if self.kind == "all-reduce" else 1)

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The axes of a mesh (name to size, in order) that the groups run along."""
        sizes = list(mesh.values())
        places = [[_place(device, sizes) for device in group] for group in self.groups]
        return tuple(
            axis
            for i, axis in enumerate(mesh)
            if any(len({place[i] for place in group}) > 1 for group in places)
        )


class Program:
    """The computations of `compiled.as_text()`.

    device_ids: of the mesh, flat in its order; programs of several TPU slices need them.
    """

    def __init__(self, text: str, *, device_ids: Sequence[int] = ()) -> None:
        self._slices = Slices(device_ids)
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self.computations.setdefault(match[2], {})
                self.entry = match[2] if match[1] else self.entry
            elif match := _INSTRUCTION.match(line):
                current[match[2]] = _parse(match[2], match[3], is_root=match[1] is not None)

    def instructions(self) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
        """Each instruction with its computation and how often it runs."""
        for instruction, times, inside in self._walk():
            yield instruction, self.computations[inside[-1]], times

    def _walk(self) -> Iterator[tuple[Instruction, int, tuple[str, ...]]]:
        """Each instruction, how often it runs, and its computation after those that fuse it."""
        stack: list[tuple[tuple[str, ...], int]] = [((self.entry,), 1)]
        while stack:
            inside, times = stack.pop()
            computation = self.computations[inside[-1]]
            for instruction in computation.values():
                yield instruction, times, inside
                inner = times
                if instruction.opcode == "while":
                    inner = times * self._trip_count(instruction, computation)
                around = inside if instruction.opcode == "fusion" else ()
                stack += [((*around, part), inner) for part in self._called(instruction)]

    def parts(
        self, instruction: Instruction, computation: dict[str, Instruction]
    ) -> list[tuple[str, int]]:
        """Computations that an instruction runs as a program of their own, and how often.

        Loops, branches (each as if taken) and calls; not what a fusion or a reduction computes.
        """
        if instruction.opcode == "while":
            body = re.search(r"body=%?([\w.\-]+)", instruction.text)
            assert body is not None, instruction.text
            return [(body[1], self._trip_count(instruction, computation))]
        if instruction.opcode in ("call", "conditional", "async-start"):
            return [(part, 1) for part in self._called(instruction)]
        return []

    def called(self, fusion: Instruction) -> dict[str, Instruction]:
        """The computation of a fusion."""
        return self.computations[self._called(fusion)[0]]

    def _called(self, instruction: Instruction) -> list[str]:
        if instruction.opcode in ("async-update", "async-done"):
            return []  # they name the computation that their start has called
        return [
            part
            for called in _CALLED.findall(instruction.text)
            for part in called.replace("%", "").replace(" ", "").split(",")
            if part in self.computations
        ]

    def _trip_count(self, loop: Instruction, computation: dict[str, Instruction]) -> int:
        if trips := _TRIPS.search(loop.text):
            return int(trips[1])
        # TPU programs do not note it: read `counter < constant`, the counter's start and its step.
        names = [re.search(rf"{part}=%?([\w.\-]+)", loop.text) for part in ("condition", "body")]
        condition, body = (self.computations[name[1]] for name in names if name is not None)
        test = next(i for i in condition.values() if i.opcode == "compare")
        counter, limit = operands(test)
        place = _INDEX.search(condition[counter].text)
        if place is None or "direction=LT" not in test.text:
            raise ValueError(f"cannot tell how often a loop runs: {test.text[:200]}")
        index = int(place[1])
        start = computation[operands(loop)[0]]  # the tuple of what the loop carries
        root = next(i for i in body.values() if i.is_root)
        step = _step(body[operands(root)[index]], body)
        span = _constant(limit, condition) - _constant(operands(start)[index], computation)
        return -(-span // step)

    @functools.cached_property
    def flops(self) -> int:
        """Of matrix products and convolutions, on one device."""
        return sum(
            times * product_flops(instruction, computation)
            for instruction, computation, times in self.instructions()
        )

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        found: list[Collective] = []
        fused: set[tuple[str, str]] = set()
        for instruction, times, inside in self._walk():
            kind = instruction.opcode.removesuffix("-start")
            crossing = crossing_kind(instruction.text) if kind == "send" else None
            if crossing is None and kind not in COLLECTIVES:
                continue
            channel = instruction.channel if len(inside) > 1 else ""
            if channel:
                # TPUs spread one collective over the fusions that it runs behind, whole in each.
                if (kind, channel) in fused:
                    continue
                fused.add((kind, channel))
                times = self._times_in_fusions(kind, channel)
            if crossing is None:
                origin = instruction.op_name
                groups = self._slices.everywhere(device_groups(instruction.text))
            else:
                kind, origin = crossing, crossing_origin(instruction.text)
                groups = self._slices.across(instruction.text)
            computation = self.computations[inside[-1]]
            shapes = [shape for n in operands(instruction) for shape in computation[n].shapes]
            num_bytes = sum(dtype_bytes(dtype) * math.prod(dims) for dtype, dims in shapes)
            if kind == "all-gather":
                num_bytes *= max(len(group) for group in groups)
            if kind == "all-reduce" and inside[-1].startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # TPUs keep one as a fusion of all-reduce and slice
            found.append(
                Collective(
                    kind,
                    instruction.name,
                    origin,
                    num_bytes,
                    tuple(shapes),
                    groups,
                    times,
                    channel,
                )
            )
        return found

    def _times_in_fusions(self, kind: str, channel: str) -> int:
        """How often a collective runs of which each fusion on its way holds a copy.

        Those of an inner loop hold a share of it: the copy that runs least counts.
        """
        return min(
            times
            for instruction, times, inside in self._walk()
            if len(inside) > 1
            and instruction.opcode.removesuffix("-start") == kind
            and instruction.channel == channel
        )

    @functools.cached_property
    def largest_array(self) -> int:
        """Elements of the largest array that any instruction makes."""
        return max(
            (
                math.prod(shape)
                for instruction, _, _ in self.instructions()
                if instruction.opcode != "tuple"
                for _, shape in instruction.shapes
            ),
            default=0,
        )

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
        return product_flops(instruction, computation) > 0 or any(
            self._has_product(inner, self.computations[part])
            for part in self._called(instruction)
            for inner in self.computations[part].values()
        )


def product_flops(instruction: Instruction, computation: dict[str, Instruction]) -> int:
    """Of the product that `instruction` is, once; 0 where it is none."""
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return 0
    by_cudnn = False
    if instruction.opcode == "custom-call":
        by_cudnn = CUDNN_CONVOLUTION.search(instruction.text) is not None
        if not by_cudnn and "__cublas$" not in instruction.text:
            return 0
    left, right = (computation[name].shapes[0][1] for name in operands(instruction)[:2])
    result = instruction.shapes[0][1]
    if instruction.opcode == "dot":
        return dot_flops(instruction.text, left, result)
    if instruction.opcode == "convolution":
        return convolution_flops(instruction.text, left, right, result)
    if by_cudnn:
        return cudnn_flops(instruction.text, left, right, result)
    return gemm_flops(instruction.text, left, result)


def operands(instruction: Instruction) -> list[str]:
    """Names of what an instruction takes."""
    inside = instruction.text.split(f" {instruction.opcode}(", 1)[1].split(")", 1)[0]
    inside = re.sub(r"/\*.*?\*/", "", inside)
    return [part.strip().split(" ")[-1].lstrip("%") for part in inside.split(",")]


def _parse(name: str, text: str, *, is_root: bool) -> Instruction:
    opcode = _OPCODE.search(text)
    result = text[: opcode.start(1)] if opcode else text
    return Instruction(name, opcode[1] if opcode else "", arrays_of(result), text, is_root)


def _place(device: int, sizes: list[int]) -> tuple[int, ...]:
    place = []
    for size in reversed(sizes):
        place.append(device % size)
        device //= size
    return tuple(reversed(place))


def _step(instruction: Instruction, body: dict[str, Instruction]) -> int:
    """What a loop adds to its counter."""
    if instruction.opcode in ("copy", "bitcast"):
        return _step(body[operands(instruction)[0]], body)
    if instruction.opcode != "add":
        raise ValueError(f"cannot tell the step of a loop: {instruction.text[:200]}")
    constants = [name for name in operands(instruction) if body[name].opcode == "constant"]
    if len(constants) != 1:
        raise ValueError(f"cannot tell the step of a loop: {instruction.text[:200]}")
    return _constant(constants[0], body)


def _constant(name: str, computation: dict[str, Instruction]) -> int:
    instruction = computation[name]
    if instruction.opcode in ("copy", "bitcast"):
        return _constant(operands(instruction)[0], computation)
    assert instruction.opcode == "constant", instruction.text
    return int(operands(instruction)[0])
