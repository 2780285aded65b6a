"""What a fusion needs of its operands, and what it makes: parts of arrays, or updates in place."""

import re

from clip_jax.planning.hlo import COLLECTIVES, Instruction, Program, operands

_NUMBER = re.compile(r"parameter\((\d+)\)")

Computation = dict[str, Instruction]

# Of each element that they make they need the same one of each operand, or fewer.
_NAMES = (
    "bitcast reshape transpose copy convert reduce-precision select clamp compare and or not xor "
    "add subtract multiply divide remainder maximum minimum power negate abs sign exponential "
    "exponential-minus-one log log-plus-one sqrt rsqrt cbrt tanh sine cosine tan erf logistic "
    "floor ceil round-nearest-even round-nearest-afz is-finite shift-left shift-right-logical "
    "shift-right-arithmetic atan2 popcnt clz real imag complex bitcast-convert slice pad "
    "dynamic-slice"
)
_BY_ELEMENT = frozenset(_NAMES.split())


class Inside:
    """What a fused computation needs of its parameters and makes of its results, in elements.

    wanted: elements of its result that are needed, where that is not all of them.
    """

    def __init__(
        self, program: Program, computation: Computation, *, wanted: int | None = None
    ) -> None:
        self._program, self._computation, self._wanted = program, computation, wanted
        self._users: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in computation}
        for instruction in computation.values():
            if instruction.opcode in ("parameter", "constant", "iota"):
                continue
            names = operands(instruction)
            for name in dict.fromkeys(names):
                if name in computation:
                    self._users[name].append((instruction, names.index(name)))
        self._root = next(i for i in computation.values() if i.is_root)
        self._needed: dict[str, int] = {}
        self._results = self._find_results()

    def read(self, place: int) -> int:
        """Of the parameter with this number."""
        wanted = f"parameter({place})"
        parameter = next(
            i for i in self._computation.values() if i.opcode == "parameter" and wanted in i.text
        )
        return self._need(parameter)

    def written(self) -> list[int]:
        """Of each result; what is updated in place is read, too, where it adds up."""
        return [self._written(name) for name in self._results]

    def updated(self) -> list[int | None]:
        """Of each result the number of the parameter whose memory it takes; None: of none."""
        return [self._updated(name) for name in self._results]

    def _updated(self, name: str) -> int | None:
        made = self._source(name)
        if made.opcode in ("dynamic-update-slice", "scatter") and self._in_place(made):
            made = self._source(operands(made)[0])
        number = _NUMBER.search(made.text)
        return int(number[1]) if made.opcode == "parameter" and number is not None else None

    def _find_results(self) -> list[str]:
        root = self._root
        while root.opcode == "bitcast":
            root = self._computation[operands(root)[0]]
        return operands(root) if root.opcode == "tuple" else [root.name] * len(root.arrays)

    def _source(self, name: str) -> Instruction:
        """What a name stands for, behind other names for it."""
        instruction = self._computation[name]
        while instruction.opcode in ("bitcast", "get-tuple-element"):
            instruction = self._computation[operands(instruction)[0]]
        return instruction

    def _written(self, name: str) -> int:
        made = self._source(name)
        if made.opcode == "parameter" or _is_collective(made) or _ends_collective(made):
            return 0  # passed on; of what is sent while others compute, the start counts all
        if made.opcode in ("dynamic-update-slice", "scatter") and self._in_place(made):
            update = self._computation[operands(made)[-1 if made.opcode == "scatter" else 1]]
            return update.arrays[0].size * (2 if made.opcode == "scatter" else 1)
        return max(array.size for array in made.arrays) if made.arrays else 0

    def _in_place(self, update: Instruction) -> bool:
        """Whether an update writes into an operand of the fusion, which is its result."""
        return self._source(operands(update)[0]).opcode == "parameter" and any(
            self._source(name) is update for name in self._results
        )

    def _need(self, instruction: Instruction) -> int:
        """Elements of what an instruction makes that others need."""
        if instruction.name not in self._needed:
            size = max((array.size for array in instruction.arrays), default=0)
            needed = 0
            if instruction.is_root and instruction.opcode not in ("parameter", "tuple"):
                needed = size if self._wanted is None else self._wanted
            for user, place in self._users[instruction.name]:
                needed = min(size, needed + self._need_of(user, place, size))
            self._needed[instruction.name] = needed
        return self._needed[instruction.name]

    def _need_of(self, user: Instruction, place: int, size: int) -> int:
        opcode = user.opcode
        if opcode == "tuple":  # the root: what is made is written, a parameter is passed on
            made = self._computation[operands(user)[place]]
            return 0 if self._source(made.name).opcode == "parameter" else size
        if _is_collective(user) or _ends_collective(user):
            return 0 if not self._starts_collective() else size
        if opcode in ("dynamic-update-slice", "scatter") and place == 0:
            return 0 if self._in_place(user) else size
        if opcode == "fusion":
            called = self._program.called(user)
            return Inside(self._program, called, wanted=self._need(user)).read(place)
        if opcode == "gather" and place == 0:
            return user.arrays[0].size
        if opcode == "get-tuple-element":
            return self._need(user)
        if opcode in _BY_ELEMENT:
            return self._need(user) if user.arrays[0].size else 0
        return size

    def _starts_collective(self) -> bool:
        return 'custom_call_target="AsyncCollectiveStart"' in self._root.text


def _is_collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in COLLECTIVES


def _ends_collective(instruction: Instruction) -> bool:
    return 'custom_call_target="AsyncCollectiveDone"' in instruction.text
