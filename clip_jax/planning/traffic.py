"""What each instruction of a program reads, writes and multiplies, as often as it runs.

Bytes of the device's main memory, of fusions what goes in and out: the rules of XLA's own cost
analysis (hlo_cost_analysis.cc), with trip counts of loops, and two more: a fusion that needs a
part of an operand reads that part, and what TPUs keep on the chip (VMEM) counts nothing.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator

from clip_jax.planning.hlo import Instruction, Program, operands, product_flops
from clip_jax.planning.hlo_arrays import DEVICE, HOST, Array
from clip_jax.planning.hlo_fusions import Inside
from clip_jax.planning.hlo_products import CUDNN_CONVOLUTION

Computation = dict[str, Instruction]

# Products in full float32 (`jax.lax.Precision.HIGHEST`).
_HIGHEST = re.compile(r"operand_precision\W+highest", re.IGNORECASE)

# They move nothing: names for what is there, or the end of what a `-start` has begun.
_NAMES = (
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id "
    "opt-barrier while conditional call async-start async-update async-done add-dependency domain "
    "send recv"
)
_FREE = frozenset(_NAMES.split())
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One instruction, each time that it runs."""

    name: str
    opcode: str
    flops: Counter[str]  # of products, by the dtype of their operands: "bf16", "f32", "f32 exact"
    num_bytes: int  # read from and written to the device's memory
    host_bytes: int  # to and from the host's
    is_fused: bool  # a fusion: several operations, one kernel


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads the work out of a program.

    leave_out: arrays that count nothing, whoever reads and writes them.
    """

    program: Program
    leave_out: Callable[[Array], bool] | None = None

    def work(self) -> Iterator[tuple[Work, int]]:
        """All instructions that do something, and how often they run."""
        for name, times in self.times.items():
            for instruction in self.program.computations[name].values():
                work = self.work_of(instruction, self.program.computations[name])
                if work is not None:
                    yield work, times

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """How often each computation runs that is a program of its own."""
        times: Counter[str] = Counter()
        waiting = [(self.program.entry, 1)]
        while waiting:
            name, runs = waiting.pop()
            times[name] += runs
            computation = self.program.computations[name]
            for instruction in computation.values():
                parts = self.program.parts(instruction, computation)
                waiting += [(part, runs * trips) for part, trips in parts]
        return dict(times)

    def work_of(self, instruction: Instruction, computation: Computation) -> Work | None:
        """None for what moves and computes nothing."""
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            return None
        if any(f'custom_call_target="{call}"' in instruction.text for call in _FREE_CALLS):
            return None
        moved: Counter[int] = Counter()
        flops: Counter[str] = Counter()
        if instruction.opcode == "fusion":
            self._fusion(instruction, computation, moved)
            self._products(self.program.called(instruction), flops)
        else:
            self._single(instruction, computation, moved)
            self._products({instruction.name: instruction}, flops, around=computation)
        return Work(
            name=instruction.name,
            opcode=instruction.opcode,
            flops=flops,
            num_bytes=moved[DEVICE],
            host_bytes=moved[HOST],
            is_fused=instruction.opcode == "fusion",
        )

    # ---- Products --------------------------------------------------------------------------------

    def _products(
        self, inside: Computation, flops: Counter[str], *, around: Computation | None = None
    ) -> None:
        for instruction in inside.values():
            if instruction.opcode == "fusion":
                self._products(self.program.called(instruction), flops)
            elif product := product_flops(instruction, around or inside):
                left = (around or inside)[operands(instruction)[0]]
                dtype = left.arrays[0].dtype
                if dtype == "f32" and _HIGHEST.search(instruction.text):
                    dtype += " exact"
                flops[dtype] += product

    # ---- One instruction ---------------------------------------------------------------------

    def _single(
        self, instruction: Instruction, computation: Computation, moved: Counter[int]
    ) -> None:
        taken = [computation[name].arrays for name in operands(instruction) if name in computation]
        opcode = instruction.opcode.removesuffix("-start")
        if opcode == "dynamic-update-slice":
            self._add(moved, taken[1])
            self._add_sized(moved, taken[0][0], taken[1][0].size)
        elif opcode in ("dynamic-slice", "slice", "gather"):
            made = _made(instruction)
            self._add(moved, (made,))
            self._add_sized(moved, taken[0][0], made.size)
            if opcode == "gather":
                self._add(moved, taken[1])
        elif opcode == "scatter":
            num = len(taken) // 2  # arrays, indices, updates
            for array, update in zip(taken[:num], taken[num + 1 :], strict=True):
                self._add_sized(moved, array[0], 2 * update[0].size)
                self._add(moved, update)
            self._add(moved, taken[num])
        elif opcode == "broadcast" or opcode == "iota":
            self._add(moved, instruction.arrays)
        elif instruction.opcode.endswith("-start"):
            # A tuple of what it takes, what it makes, and flags.
            for arrays in taken:
                self._add(moved, arrays)
            self._add(moved, _made_by_start(instruction, sum(map(len, taken))))
        else:
            for arrays in taken:
                self._add(moved, arrays)
            made_by = instruction.arrays
            if "__cublas$" in instruction.text or CUDNN_CONVOLUTION.search(instruction.text):
                made_by = made_by[:1]  # then its workspace
            self._add(moved, made_by)

    def _add(self, moved: Counter[int], arrays: tuple[Array, ...]) -> None:
        for array in arrays:
            self._add_sized(moved, array, array.size)

    def _add_sized(self, moved: Counter[int], array: Array, size: int) -> None:
        """`size` elements of it, with their share of what fills up its tiles."""
        if array.size == 0 or (self.leave_out is not None and self.leave_out(array)):
            return
        moved[array.space] += array.padded_bytes * size // array.size

    # ---- Fusions -----------------------------------------------------------------------------

    def _fusion(self, fusion: Instruction, computation: Computation, moved: Counter[int]) -> None:
        inside = Inside(self.program, self.program.called(fusion))
        for place, name in enumerate(operands(fusion)):
            for array in computation[name].arrays if name else ():
                self._add_sized(moved, array, min(inside.read(place), array.size))
        for array, size in zip(fusion.arrays, inside.written(), strict=False):
            self._add_sized(moved, array, min(size, 2 * array.size))


def _made(instruction: Instruction) -> Array:
    """The result of a slice or a gather; of a `-start`, the one that is not its operand."""
    if not instruction.opcode.endswith("-start"):
        return instruction.arrays[0]
    return instruction.arrays[1]


def _made_by_start(instruction: Instruction, num_taken: int) -> tuple[Array, ...]:
    arrays = instruction.arrays
    if instruction.opcode == "copy-start":
        return arrays[:1]
    return arrays[num_taken : 2 * num_taken] if len(arrays) > num_taken else arrays
