"""What a step holds in a device's memory, and for what: read from its compiled program.

Sizes of what is there before the step are those of the program's arguments as they lie in memory.
What it allocates is the compiler's own figure. Of that, activations are found in the schedule: the
values that an instruction of the forward pass makes and one of the backward pass takes, which JAX
tells apart in the names of operations (`jvp(...)`, `transpose(jvp(...))`), from the one to the last
of the others. The rest is temporary.
"""

import dataclasses
import re
from typing import NamedTuple

from clip_jax.planning.hlo import Instruction, Program, operands
from clip_jax.planning.hlo_arrays import DEVICE

_GROUPS = {"params": "parameters", "opt_state": "optimizer"}  # of a state; others: model_state
_STATE = re.compile(r"state\.(\w+)")
# They hand on what they are given: a value lives on in their result.
_PASSES_ON = {"tuple", "bitcast", "copy", "copy-start", "copy-done", "optimization-barrier"}
_MAKES_NOTHING = {"parameter", "constant", "get-tuple-element"} | _PASSES_ON
_BODY = re.compile(r"body=%?([\w.\-]+)")
_INDEX = re.compile(r"index=(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device.

    `parameters`, `optimizer`, `model_state` and `batch` are there before the step; `activations`
    and `temporaries` while it runs; `output` is what it makes beside the state, whose arrays take
    the place of the old ones. `total` is the peak, what must fit.
    """

    parameters: int
    optimizer: int
    model_state: int  # batch statistics, the moving average of the weights, counters
    batch: int
    activations: int  # of the forward pass, kept for the backward one
    temporaries: int  # the rest of what the program allocates
    output: int
    total: int
    attention_scores: int = 0  # that fused attention does not make: left out of `total`


class Allocated(NamedTuple):
    """Bytes on one device, by the compiler (`compiled.memory_analysis()`)."""

    arguments: int
    temporaries: int
    outputs: int
    aliased: int  # outputs that take the place of arguments
    code: int  # of the program, which a TPU has in the same memory


def memory_of(program: Program, allocated: Allocated, *, attention_scores: int = 0) -> Memory:
    """attention_scores: bytes of the peak that the run's own attention does without."""
    held = dict.fromkeys(("parameters", "optimizer", "model_state", "batch"), 0)
    for instruction in program.computations[program.entry].values():
        if instruction.opcode == "parameter":
            held[_group(instruction.op_name)] += _bytes(instruction)
    temporaries = allocated.temporaries + allocated.code
    scores = min(attention_scores, temporaries)
    activations = min(activation_bytes(program), allocated.temporaries)
    # What is not made is taken from the activations first: its scores are nearly all of them.
    activations, temporaries = (
        max(activations - scores, 0),
        temporaries - max(activations, scores),
    )
    output = allocated.outputs - allocated.aliased
    return Memory(
        **held,
        activations=activations,
        # Arguments lie one after the other, with gaps between them.
        temporaries=temporaries + allocated.arguments - sum(held.values()),
        output=output,
        total=allocated.arguments + allocated.temporaries + allocated.code - scores + output,
        attention_scores=scores,
    )


def _group(op_name: str) -> str:
    """Of the argument that is named so."""
    match = _STATE.match(op_name)
    return "batch" if match is None else _GROUPS.get(match[1], "model_state")


def activation_bytes(program: Program) -> int:
    """The most that values made going forward and taken going backward hold at a time.

    In a loop over microbatches, those of one; in a loop over layers, what a layer makes again.
    """
    return _most_kept(program, program.entry)


def _most_kept(program: Program, name: str) -> int:
    """Of one computation, with the loops that it runs."""
    computation = program.computations[name]
    order = list(computation.values())
    values = _Values(program, computation)
    for place, instruction in enumerate(order):
        values.see(place, instruction)
    change = [0] * (len(order) + 1)
    for made in values.made.values():
        if made.is_kept:
            change[made.place] += made.num_bytes
            change[made.last + 1] -= made.num_bytes
    most = held = 0
    for place, instruction in enumerate(order):
        held += change[place]
        parts = program.parts(instruction, computation)
        most = max(most, held + max((_most_kept(program, part) for part, _ in parts), default=0))
    return most


@dataclasses.dataclass
class _Made:
    """A value of the forward pass."""

    place: int
    num_bytes: int
    stage: str | None
    last: int  # place of the last instruction that takes it
    is_kept: bool = False  # whether a later stage takes it


class _Values:
    """The values of one computation, seen in the order of its schedule."""

    def __init__(self, program: Program, computation: dict[str, Instruction]) -> None:
        self._program, self._computation = program, computation
        self.made: dict[str, _Made] = {}
        self._behind: dict[str, frozenset[str]] = {}  # a result, to the values that live on in it
        self._places: dict[str, int] = {}

    def see(self, place: int, instruction: Instruction) -> None:
        self._places[instruction.name] = place
        if instruction.opcode in ("parameter", "constant"):
            return
        taken = operands(instruction)
        behind: frozenset[str] = frozenset().union(*(self._behind.get(n, ()) for n in taken))
        for value in behind:
            made = self.made[value]
            made.last = place
            made.is_kept |= _goes_back(instruction) and _stage(instruction) != made.stage
        if instruction.opcode == "get-tuple-element":
            self._take_out(instruction, taken[0], behind)
        elif instruction.opcode in _PASSES_ON:
            self._behind[instruction.name] = behind
        elif _stage(instruction) is not None and not _is_tuple(instruction):
            self._add(instruction, instruction, place)

    def _take_out(self, element: Instruction, whole: str, behind: frozenset[str]) -> None:
        """An element of a loop's or fusion's results is a value from where that ran."""
        maker = self._computation[whole]
        if maker.opcode in _MAKES_NOTHING:
            self._behind[element.name] = behind
        elif _stage(maker) is not None and not self._is_unchanged(maker, element):
            self._add(element, maker, self._places[whole])

    def _add(self, instruction: Instruction, maker: Instruction, place: int) -> None:
        self.made[instruction.name] = _Made(place, _bytes(instruction), _stage(maker), last=place)
        self._behind[instruction.name] = frozenset({instruction.name})

    def _is_unchanged(self, loop: Instruction, element: Instruction) -> bool:
        """Whether a loop hands this element through, as it does the weights."""
        index = _INDEX.search(element.text)
        body = _BODY.search(loop.text)
        if loop.opcode != "while" or body is None or index is None:
            return False
        inside = self._program.computations[body[1]]
        root = next(i for i in inside.values() if i.is_root)
        if root.opcode != "tuple":
            return False
        last = inside[operands(root)[int(index[1])]]
        return (
            last.opcode == "get-tuple-element"
            and inside[operands(last)[0]].opcode == "parameter"
            and f"index={index[1]}" in re.split(r"[,\s]", last.text)
        )


def _stage(instruction: Instruction) -> str | None:
    """What makes values that a later stage takes: the forward pass, or a part of it made again.

    Parts inside each other, as a layer's of a microbatch's, are told apart. None: neither, as the
    backward pass, whose values nothing takes later.
    """
    name = instruction.op_name
    if instruction.opcode in _MAKES_NOTHING:
        return None
    before, again, _ = name.rpartition("rematted_computation")
    if again:
        return before
    return "" if "jvp(" in name and "transpose(" not in name else None


def _goes_back(instruction: Instruction) -> bool:
    return instruction.opcode not in _MAKES_NOTHING and "transpose(" in instruction.op_name


def _is_tuple(instruction: Instruction) -> bool:
    return len(instruction.shapes) != 1 or instruction.text.startswith("(")


def _bytes(instruction: Instruction) -> int:
    """In the device's memory; what lies on the chip or on the host is not."""
    return sum(array.padded_bytes for array in instruction.arrays if array.space == DEVICE)
