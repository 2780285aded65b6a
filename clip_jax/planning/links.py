"""Which wires a collective goes over, and how long it takes at their full speed.

TPUs: each chip has two links along each dim of its slice's torus. Where the groups of a collective
vary along a dim that is a ring they use both, else one (Austin et al. 2025, "How to Scale Your
Model", chapter 3); a permutation uses one: those pairs that are farther apart go back along links
whose other direction is taken. Groups whose members are not neighbors share the links between them
with the groups of the chips in between.
GPUs: all NVLinks inside a node. Groups that span slices or nodes reduce inside each first, exchange
a chip's share of the result over the network, in a tree, and gather it inside.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from clip_jax.parallel.chips import Chip
from clip_jax.planning.hlo import Collective

# Sides at which a dim is a ring: of 2-D slices a whole pod's 16, of 3-D ones multiples of 4, where
# all sides are (Google's Cloud TPU documentation, "TPU v5e", "TPU v6e" and "TPU v4").
_NUM_DIMS = {"TPU v5e": 2, "TPU v6e": 2}
_RING_2D, _RING_3D = 16, 4
# Between the two devices of a chip of TPU7x, in links of ICI (its page of the documentation).
_LINKS_IN_CHIP = 6
# Bytes per second, where the data sheet names no link or no network of its own.
_PCIE = 32e9  # PCIe 4.0 x16, one direction
_NETWORK = 100e9 / 8  # an adapter of 100 Gbit/s


class Stage(NamedTuple):
    """Of one run of a collective, what goes over links of one kind."""

    link: str  # "ICI" | "NVLink" | "PCIe" | "DCN" | "memory"
    num_bytes: float  # that a device sends
    seconds: float
    hops: int  # of its longest way, for its latency


class Route(NamedTuple):
    """One run of a collective. () stages: nobody sends."""

    stages: tuple[Stage, ...]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """The devices of a mesh, flat in its order, and what joins them.

    copy_bandwidth: of CPUs, whose devices share one memory, in bytes per second.
    """

    devices: Sequence[Any]
    chip: Chip | None
    copy_bandwidth: float = math.inf

    def route(self, collective: Collective) -> Route:
        """Of one run. A device that sends nothing takes no time."""
        sent = collective.sent_bytes / collective.times
        if not sent:
            return Route(())
        if self.chip is None:
            return Route((Stage("memory", sent, sent / self.copy_bandwidth, 0),))
        if collective.kind == "collective-permute":
            return self._permutation(collective, sent)
        group = max(collective.groups, key=len)
        slices = self._by_slice(group)
        inside = max(slices, key=len)
        # Of what is sent, the part that stays inside a slice; of an exchange, by its targets.
        share = (len(inside) - 1) / (len(group) - 1)
        if collective.kind != "all-to-all":
            share *= len(group) / len(inside)
        stages = []
        if len(inside) > 1:
            seconds, hops = self._inside(collective, inside, sent * share)
            stages.append(Stage(self._link, sent * share, seconds, hops))
        if len(slices) > 1:
            # What a device keeps of the array after the stage inside its slice goes across.
            across = sent * (1 - share)
            hops = 1 if collective.kind == "all-to-all" else math.ceil(math.log2(len(slices)))
            stages.append(Stage("DCN", across, across / self._network_bandwidth, hops))
        return Route(tuple(stages))

    # ---- Inside a slice or a node ----------------------------------------------------------------

    def _inside(
        self, collective: Collective, group: Sequence[int], sent: float
    ) -> tuple[float, int]:
        """Seconds, and steps along the longest way."""
        if not self._is_tpu:
            return sent / self._node_bandwidth, 1
        sides = self._sides
        places = [self._place(device) for device in group]
        taken = [sorted({place[dim] for place in places}) for dim in range(len(sides))]
        extents = [len(members) for members in taken]
        if max(extents) == 1:  # the two devices of a chip
            return sent / (_LINKS_IN_CHIP * self._one_link), 1
        strides = [
            _stride(members, side, is_ring=self._is_ring(side))
            for members, side in zip(taken, sides, strict=True)
        ]
        rings = [
            extent > 1 and extent * stride == side and self._is_ring(side)
            for extent, stride, side in zip(extents, strides, sides, strict=True)
        ]
        # The devices of a chip share its links, unless they are of one group.
        sharing = self._num_cores if len(group) == math.prod(extents) else 1
        if collective.kind == "all-to-all":
            # Half of what each device has crosses the middle of each dim.
            whole = sent * len(group) / (len(group) - 1)
            seconds = max(
                whole * extent * stride / (8 if ring else 4) / self._one_link
                for extent, stride, ring in zip(extents, strides, rings, strict=True)
                if extent > 1
            )
            return seconds * sharing, round(max(map(math.prod, zip(extents, strides, strict=True))))
        num_links = sum(
            (2 if ring else 1) / stride
            for extent, stride, ring in zip(extents, strides, rings, strict=True)
            if extent > 1
        )
        hops = sum(
            round(stride * (extent // 2 if ring else extent - 1))
            for extent, stride, ring in zip(extents, strides, rings, strict=True)
        )
        return sent / (num_links * self._one_link) * sharing, hops

    def _permutation(self, collective: Collective, sent: float) -> Route:
        pairs = [pair for pair in collective.groups if pair[0] != pair[1]]
        if not pairs:
            return Route(())
        if any(len(self._by_slice(pair)) > 1 for pair in pairs):
            return Route((Stage("DCN", sent, sent / self._network_bandwidth, 1),))
        if not self._is_tpu:
            return Route((Stage(self._link, sent, sent / self._node_bandwidth, 1),))
        hops = max(self._distance(*pair) for pair in pairs)
        if hops == 0:
            seconds, hops = sent / (_LINKS_IN_CHIP * self._one_link), 1
        else:
            seconds = sent * self._num_cores / self._one_link
        return Route((Stage(self._link, sent, seconds, hops),))

    def _distance(self, one: int, other: int) -> int:
        hops = 0
        for a, b, side in zip(self._place(one), self._place(other), self._sides, strict=True):
            apart = abs(a - b)
            hops += min(apart, side - apart) if self._is_ring(side) else apart
        return hops

    # ---- What the devices tell -------------------------------------------------------------------

    @property
    def _is_tpu(self) -> bool:
        return self.chip is not None and self.chip.name.startswith("TPU")

    @property
    def _link(self) -> str:
        assert self.chip is not None
        if self._is_tpu:
            return "ICI"
        return "PCIe" if self.chip.link_bandwidth is None else "NVLink"

    @property
    def _num_cores(self) -> int:
        return 1 if self.chip is None else self.chip.num_devices

    @property
    def _node_bandwidth(self) -> float:
        assert self.chip is not None
        return self.chip.link_bandwidth or _PCIE

    @property
    def _network_bandwidth(self) -> float:
        """A device's share."""
        assert self.chip is not None
        return (self.chip.network_bandwidth or _NETWORK) / self._num_cores

    @property
    def _num_dims(self) -> int:
        assert self.chip is not None
        return _NUM_DIMS.get(self.chip.name, 3)

    @property
    def _one_link(self) -> float:
        assert self.chip is not None
        assert self.chip.link_bandwidth is not None, "every TPU has links"
        return self.chip.link_bandwidth / (2 * self._num_dims)

    @property
    def _sides(self) -> tuple[int, ...]:
        """Of a slice."""
        coords = np.array([device.coords for device in self.devices])
        return tuple(int(side) for side in (coords.max(0) - coords.min(0) + 1)[: self._num_dims])

    def _is_ring(self, side: int) -> bool:
        if self._num_dims == 2:
            return side == _RING_2D
        return all(each % _RING_3D == 0 for each in self._sides) and side > 1

    def _place(self, device: int) -> tuple[int, ...]:
        return tuple(self.devices[device].coords[: self._num_dims])

    def _by_slice(self, group: Sequence[int]) -> list[list[int]]:
        """A group by slice of a TPU or node of GPUs."""
        found: dict[int, list[int]] = {}
        for device in group:
            found.setdefault(self._slice(device), []).append(device)
        return list(found.values())

    def _slice(self, device: int) -> int:
        here = self.devices[device]
        if self._is_tpu:
            return getattr(here, "slice_index", None) or 0
        return int(here.process_index)


def _stride(members: Sequence[int], side: int, *, is_ring: bool) -> float:
    """Links from one of the members along a dim to the next, on average."""
    if len(members) == 1:
        return 1.0
    gaps = [after - before for before, after in itertools.pairwise(members)]
    if is_ring:  # the longest gap is the one that nothing crosses
        gaps.append(members[0] + side - members[-1])
        gaps.remove(max(gaps))
    return sum(gaps) / len(gaps)
