"""Which wires a collective goes over, and how long it takes at their full speed.

TPUs: each chip has two links along each dim of its slice's torus. Where the groups of a collective
vary along a dim that is a ring they use both, else one (Austin et al. 2025, "How to Scale Your
Model", chapter 3); a permutation uses one: those pairs that are farther apart go back along links
whose other direction is taken.
GPUs: all NVLinks inside a node. Groups that span slices or nodes reduce inside each first, exchange
a chip's share of the result over the network, and gather it inside.
"""

import dataclasses
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


class Route(NamedTuple):
    link: str  # "ICI" | "NVLink" | "PCIe" | "DCN" | "memory": the slowest part of it
    seconds: float  # of one run of the collective
    hops: int  # of the slowest step, for its latency


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
            return Route("memory", 0.0, 0)
        if self.chip is None:
            return Route("memory", sent / self.copy_bandwidth, 0)
        if collective.kind == "collective-permute":
            return self._permutation(collective, sent)
        group = max(collective.groups, key=len)
        slices = self._by_slice(group)
        inside = max(slices, key=len)
        seconds, hops, link = 0.0, 0, self._link
        if len(inside) > 1:
            share = (len(inside) - 1) / len(inside) * len(group) / (len(group) - 1)
            seconds, hops = self._inside(collective, inside, sent * share)
        if len(slices) > 1:
            # What a device keeps of the array after the stage inside its slice goes across.
            share = (len(slices) - 1) / len(slices) / len(inside) * len(group) / (len(group) - 1)
            if collective.kind == "all-to-all":
                share = (len(group) - len(inside)) / (len(group) - 1)
            across = sent * share / self._network_bandwidth
            link = "DCN" if across > seconds else link
            seconds += across
        return Route(link, seconds, hops + len(slices) - 1)

    # ---- Inside a slice or a node ----------------------------------------------------------------

    def _inside(
        self, collective: Collective, group: Sequence[int], sent: float
    ) -> tuple[float, int]:
        """Seconds, and steps along the longest way."""
        if not self._is_tpu:
            return sent / self._node_bandwidth, 1
        sides = self._sides
        places = [self._place(device) for device in group]
        extents = [len({place[dim] for place in places}) for dim in range(len(sides))]
        if max(extents) == 1:  # the two devices of a chip
            return sent / (_LINKS_IN_CHIP * self._one_link), 1
        rings = [
            extent == side and self._is_ring(side)
            for extent, side in zip(extents, sides, strict=True)
        ]
        # The devices of a chip share its links, unless they are of one group.
        sharing = self._num_cores if len(group) == math.prod(extents) else 1
        if collective.kind == "all-to-all":
            # Half of what each device has crosses the middle of each dim.
            whole = sent * len(group) / (len(group) - 1)
            seconds = max(
                whole * extent / (8 if ring else 4) / self._one_link
                for extent, ring in zip(extents, rings, strict=True)
                if extent > 1
            )
            return seconds * sharing, max(extents)
        num_links = sum(
            2 if ring else 1 for extent, ring in zip(extents, rings, strict=True) if extent > 1
        )
        hops = sum(
            extent // 2 if ring else extent - 1 for extent, ring in zip(extents, rings, strict=True)
        )
        return sent / (num_links * self._one_link) * sharing, hops

    def _permutation(self, collective: Collective, sent: float) -> Route:
        pairs = [pair for pair in collective.groups if pair[0] != pair[1]]
        if not pairs:
            return Route("memory", 0.0, 0)
        if any(len(self._by_slice(pair)) > 1 for pair in pairs):
            return Route("DCN", sent / self._network_bandwidth, 1)
        if not self._is_tpu:
            return Route(self._link, sent / self._node_bandwidth, 1)
        hops = max(self._distance(*pair) for pair in pairs)
        if hops == 0:
            return Route(self._link, sent / (_LINKS_IN_CHIP * self._one_link), 1)
        return Route(self._link, sent * self._num_cores / self._one_link, hops)

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
