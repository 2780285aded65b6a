"""What crosses the slices of a TPU program, and which devices its numbers name.

Such a program is that of one slice and numbers the devices of its own. What goes to other slices is
a `send` to and a `recv` from the host, which the runtime of multislice, Megascale, carries over the
data-center network: it names devices by their ids, slice * 100000 + place in the slice.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from clip_jax.config.errors import UserError
from clip_jax.planning.hlo_groups import Groups

_TYPE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_KINDS = {
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_REDUCE": "all-reduce",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
# Slices by devices of each, "{1,2}x{0:3}"; or groups of ids; or pairs of them, {{100000->200000}}.
_PRODUCT = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}x\{([\d,:]+)\}"')
_LISTED = re.compile(r"_xla_megascale_target=\{(\{[\d,{}> -]*\})\}")
_SLICE = 100_000  # ids of a slice begin at a multiple of it


def crossing_kind(text: str) -> str | None:
    """Of the collective that a `send` is between slices; None where it is no such send.

    Raises UserError for one that is not known.
    """
    match = _TYPE.search(text)
    if match is None:
        return None
    if match[1] not in _KINDS:
        raise UserError(
            f"the program sends between slices by {match[1]}, which plan cannot count; it knows "
            f"{', '.join(_KINDS)}"
        )
    return _KINDS[match[1]]


def rendezvous(text: str) -> str:
    """What a `send` and its `recv` share; '' where there is none."""
    match = _RENDEZVOUS.search(text)
    return match[1] if match else ""


def crossing_origin(text: str) -> str:
    """As an instruction's `op_name`, which a `send` has lost: '' where XLA made the collective up.

    The rendezvous keeps the name that the collective had: of a JAX primitive inside a `shard_map`
    ("ppermute.73"), or of an instruction of XLA ("all-reduce.128").
    """
    name = rendezvous(text).rpartition("_")[0]
    return "" if name.startswith(tuple(_KINDS.values())) else f"shard_map/{name}"


class Slices:
    """The devices of a mesh by slice.

    device_ids: in the order of the mesh, flat; (): a program that numbers all of them.
    """

    def __init__(self, device_ids: Sequence[int] = ()) -> None:
        self._place = {device: place for place, device in enumerate(device_ids)}
        slices: defaultdict[int, list[int]] = defaultdict(list)
        for place, device in enumerate(device_ids):
            slices[device // _SLICE].append(place)
        self._slices = list(slices.values())

    def everywhere(self, groups: Groups) -> Groups:
        """Groups of one slice's devices as those of the mesh, in each slice."""
        if len(self._slices) < 2:
            return groups
        return tuple(
            tuple(places[device] for device in group) for places in self._slices for group in groups
        )

    def across(self, text: str) -> Groups:
        """Groups of the mesh's devices that a `send` joins; of a permutation (from, to)."""
        if match := _PRODUCT.search(text):
            slices = list(_numbers(match[1]))
            groups: Iterable[Iterable[int]] = (
                (_SLICE * each + device for each in slices) for device in _numbers(match[2])
            )
        elif match := _LISTED.search(text):
            groups = (map(int, re.findall(r"\d+", g)) for g in re.findall(r"\{([^}]*)\}", match[1]))
        else:
            raise ValueError(f"no devices of other slices in {text[-2000:]}")
        assert self._place, "a program of several slices needs the ids of its devices"
        return tuple(tuple(self._place[device] for device in group) for group in groups)


def _numbers(text: str) -> Iterable[int]:
    """`0:3` is 0, 1, 2, 3."""
    for part in text.split(","):
        first, _, last = part.partition(":")
        yield from range(int(first), int(last or first) + 1)
