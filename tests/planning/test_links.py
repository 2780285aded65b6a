"""Times of collectives over wires, against counts by hand."""

import dataclasses
import itertools
import math
from typing import NamedTuple

import pytest

from clip_jax.parallel.chips import CHIPS
from clip_jax.planning import Collective
from clip_jax.planning.links import Network

MB = 10**6


class Place(NamedTuple):
    """What of a device the wires depend on."""

    coords: tuple[int, ...] = (0, 0, 0)
    slice_index: int = 0
    process_index: int = 0


def chip_named(name):
    return next(chip for chip in CHIPS if chip.name == name)


def slice_of(*sides, num_slices=1, cores=1):
    """Devices of TPU slices, the last side fastest."""
    return [
        Place((*coords, 0)[:3], slice_index)
        for slice_index in range(num_slices)
        for coords in itertools.product(*map(range, sides))
        for _ in range(cores)
    ]


def collective(groups, *, kind="all-gather", num_bytes=16 * MB, times=1):
    return Collective(
        kind=kind,
        name="c",
        op_name="",
        num_bytes=num_bytes,
        shapes=(),
        groups=tuple(map(tuple, groups)),
        times=times,
    )


LINK = 50e9  # of v5e, one direction
ROWS_OF_16 = [range(16 * i, 16 * i + 16) for i in range(16)]


@pytest.mark.parametrize(
    ("sides", "groups", "num_links"),
    [
        ((4, 4), [range(4 * i, 4 * i + 4) for i in range(4)], 1),  # a line of four
        ((4, 4), [range(16)], 2),  # two dims, neither a ring
        ((16, 16), ROWS_OF_16, 2),  # a ring
        ((16, 16), [range(256)], 4),
        ((16, 16), [range(16 * i, 16 * i + 8) for i in range(16)], 1),  # half of a ring
        # Two groups to a line, each member two links from the next.
        ((8, 8), [range(8 * i + j, 8 * i + 8, 2) for i in range(8) for j in range(2)], 1 / 2),
        ((16, 16), [range(16 * i, 16 * i + 16, 4) for i in range(16)], 2 / 4),  # round a ring
        ((16, 16), [(16 * i, 16 * i + 15) for i in range(16)], 1),  # neighbors on a ring
        ((4, 4), [(0, 1, 2, 3, 8, 9, 10, 11)], 1 + 1 / 2),  # rows 0 and 2
    ],
)
def test_a_gather_uses_the_links_of_the_dims_that_it_spans(sides, groups, num_links):
    network = Network(devices=slice_of(*sides), chip=chip_named("TPU v5e"))
    route = network.route(collective(groups))
    size = len(groups[0])
    (stage,) = route.stages
    assert stage.link == "ICI"
    assert stage.num_bytes == 16 * MB * (size - 1) / size
    assert stage.seconds == pytest.approx(stage.num_bytes / (num_links * LINK))


def test_times_are_of_one_run_and_an_all_reduce_sends_twice():
    network = Network(devices=slice_of(4, 4), chip=chip_named("TPU v5e"))
    gather, reduce = (
        network.route(collective([range(16)], kind=kind, times=7)).seconds
        for kind in ("all-gather", "all-reduce")
    )
    assert reduce == pytest.approx(2 * gather)
    assert gather == pytest.approx(16 * MB * 15 / 16 / (2 * LINK))


def test_a_ring_of_permutations_uses_one_link():
    network = Network(devices=slice_of(16, 16), chip=chip_named("TPU v5e"))
    pairs = [(i, i - i % 16 + (i + 1) % 16) for i in range(256)]
    route = network.route(collective(pairs, kind="collective-permute"))
    assert route.seconds == pytest.approx(16 * MB / LINK)
    assert [stage.hops for stage in route.stages] == [1]
    line = Network(devices=slice_of(8, 8), chip=chip_named("TPU v5e"))
    pairs = [(i, i - i % 8 + (i + 1) % 8) for i in range(64)]
    (stage,) = line.route(collective(pairs, kind="collective-permute")).stages
    assert stage.hops == 7  # back to the start


def test_devices_of_a_chip_share_its_links():
    chip = chip_named("TPU7x")
    devices = slice_of(2, 2, 2, cores=2)
    network = Network(devices=devices, chip=chip)
    one_link = chip.link_bandwidth / 6
    both = network.route(collective([(0, 1)])).seconds
    assert both == pytest.approx(16 * MB / 2 / (6 * one_link))
    apart = network.route(collective([(0, 2), (1, 3)])).seconds
    assert apart == pytest.approx(16 * MB / 2 / one_link * 2)


def test_an_exchange_is_bound_by_the_middle_of_a_ring():
    """Half of each device's bytes crosses it, over two links in each direction."""
    network = Network(devices=slice_of(16, 16), chip=chip_named("TPU v5e"))
    route = network.route(collective(ROWS_OF_16, kind="all-to-all"))
    assert route.seconds == pytest.approx(8 * 16 * MB / 2 / (2 * LINK))
    line = Network(devices=slice_of(4, 4), chip=chip_named("TPU v5e"))
    rows = [range(4 * i, 4 * i + 4) for i in range(4)]
    route = line.route(collective(rows, kind="all-to-all"))
    assert route.seconds == pytest.approx(2 * 16 * MB / 2 / LINK)


def test_across_slices_a_chip_sends_its_share_of_what_its_slice_has():
    chip = chip_named("TPU v5e")
    network = Network(devices=slice_of(4, 4, num_slices=2), chip=chip)
    route = network.route(collective([range(32)], num_bytes=320 * MB, kind="all-reduce"))
    inside, across = route.stages
    assert inside.link == "ICI"
    assert inside.num_bytes == pytest.approx(2 * 320 * MB * 15 / 16)
    assert inside.seconds == pytest.approx(inside.num_bytes / (2 * LINK))
    assert across.link == "DCN"
    assert across.num_bytes == pytest.approx(2 * 320 * MB / 16 / 2)
    assert across.seconds == pytest.approx(across.num_bytes / chip.network_bandwidth)
    assert route.seconds == pytest.approx(inside.seconds + across.seconds)


def test_an_exchange_across_slices_sends_by_where_it_goes():
    network = Network(devices=slice_of(4, 4, num_slices=2), chip=chip_named("TPU v5e"))
    route = network.route(collective([range(32)], num_bytes=32 * MB, kind="all-to-all"))
    assert [stage.num_bytes for stage in route.stages] == pytest.approx([15 * MB, 16 * MB])


@pytest.mark.parametrize(
    ("num_nodes", "kind", "hops"),
    [(2, "all-reduce", 1), (32, "all-reduce", 5), (33, "all-gather", 6), (32, "all-to-all", 1)],
)
def test_across_nodes_latency_grows_with_a_tree(num_nodes, kind, hops):
    devices = [Place(process_index=i // 8) for i in range(8 * num_nodes)]
    network = Network(devices=devices, chip=chip_named("H100 SXM"))
    inside, across = network.route(collective([range(8 * num_nodes)], kind=kind)).stages
    assert (inside.link, inside.hops) == ("NVLink", 1)
    assert (across.link, across.hops) == ("DCN", hops)


@pytest.mark.parametrize(
    ("name", "groups", "link", "seconds"),
    [
        ("H100 SXM", [range(8)], "NVLink", 16 * MB * 7 / 8 / 450e9),
        ("H100 SXM", [(i, i + 8) for i in range(8)], "DCN", 16 * MB / 2 / 50e9),
        ("L4", [range(8)], "PCIe", 16 * MB * 7 / 8 / 32e9),
    ],
)
def test_gpus_have_nvlink_in_a_node_and_a_network_beyond(name, groups, link, seconds):
    devices = [Place(process_index=i // 8) for i in range(16)]
    (stage,) = Network(devices=devices, chip=chip_named(name)).route(collective(groups)).stages
    assert stage.link == link
    assert stage.seconds == pytest.approx(seconds)


def test_cpus_copy_through_memory():
    network = Network(devices=[Place()] * 2, chip=None, copy_bandwidth=10e9)
    (stage,) = network.route(collective([(0, 1)])).stages
    assert (stage.link, stage.seconds) == ("memory", pytest.approx(16 * MB / 2 / 10e9))


def test_nobody_waits_for_what_nobody_sends():
    network = Network(devices=slice_of(4, 4), chip=chip_named("TPU v5e"))
    for nothing in (collective([(0,), (1,)]), collective([], kind="collective-permute")):
        assert network.route(nothing).stages == ()


def test_every_chip_has_a_route():
    """Whatever a data sheet leaves out."""
    for chip in CHIPS:
        is_tpu = chip.name.startswith("TPU")
        devices = slice_of(4, 4, 4) if is_tpu else [Place(process_index=i // 4) for i in range(8)]
        for change in ({}, {"network_bandwidth": None}):
            network = Network(devices=devices, chip=dataclasses.replace(chip, **change))
            seconds = network.route(collective([range(len(devices))])).seconds
            assert 0 < seconds < math.inf
