"""Collectives between the slices of TPUs, against a program of two slices of four chips.

`two_slices.hlo` has two of the 53 transfers of a quickstart compiled for `v5e:2x2*2`, as libtpu
wrote them, with little around them.
"""

from pathlib import Path

import pytest

from clip_jax.config import UserError
from clip_jax.planning import Program
from clip_jax.planning.hlo_slices import Slices, crossing_kind

TEXT = (Path(__file__).parent / "two_slices.hlo").read_text()
# Neighbors of a ring of 2 x 2 chips, as a mesh of (data, fsdp) = (2, 4) has them.
IDS = (100000, 100001, 100003, 100002, 200000, 200001, 200003, 200002)
MESH = {"data": 2, "fsdp": 4, "tensor": 1}


def collectives(text=TEXT):
    return {c.name: c for c in Program(text, device_ids=IDS).collectives}


def test_what_is_sent_to_other_slices_is_a_collective():
    reduced, passed = (collectives()[name] for name in ("send.52", "send.62"))
    assert (reduced.kind, reduced.times) == ("all-reduce", 1)
    assert reduced.groups == ((0, 4), (1, 5), (3, 7), (2, 6))
    assert reduced.axes(MESH) == ("data",)
    assert reduced.sent_bytes == 2 * (4 * 8 * 128 * 4) // 2
    assert reduced.op_name == ""  # of a gradient: XLA made it
    assert (passed.kind, passed.times) == ("collective-permute", 6)
    assert passed.groups == ((3, 7), (4, 0))  # at both ends of a ring that turns round
    assert passed.sent_bytes == 6 * 16 * 4
    assert passed.op_name == "shard_map/ppermute.73"


def test_groups_of_a_slice_are_those_of_each():
    found = collectives()
    assert found["reduced"].groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert found["reduced"].axes(MESH) == ("fsdp",)
    assert found["here"].groups == ((0, 1), (1, 2), (2, 3), (4, 5), (5, 6), (6, 7))
    assert Slices(range(4)).everywhere(((0, 1), (2, 3))) == ((0, 1), (2, 3))


@pytest.mark.parametrize(
    ("kind", "name", "num_bytes"),
    [
        ("all-gather", "ALL_GATHER", 2 * 16384),  # what it makes of two
        ("reduce-scatter", "REDUCE_SCATTER", 16384),
        ("all-to-all", "ALL_TO_ALL", 16384),
    ],
)
def test_every_kind_between_slices(kind, name, num_bytes):
    found = collectives(TEXT.replace('"ALL_REDUCE"', f'"{name}"'))["send.52"]
    assert (found.kind, found.num_bytes) == (kind, num_bytes)


@pytest.mark.parametrize(
    ("target", "groups"),
    [
        ('"{2}x{0:1,3}"', ((4,), (5,), (6,))),
        ("{{100000,200000},{100001,200001}}", ((0, 4), (1, 5))),
        ("{{100002->200002}}", ((3, 7),)),
    ],
)
def test_every_spelling_of_devices_of_other_slices(target, groups):
    assert Slices(IDS).across(f"{{_xla_megascale_target={target},_xla_x=1}}") == groups
    with pytest.raises(ValueError, match="no devices of other slices"):
        Slices(IDS).across("_xla_megascale_target=all")


def test_a_send_of_another_kind_is_an_error_and_one_to_the_host_is_none():
    with pytest.raises(UserError, match=r"by ALL_TO_SOME, .* it knows ALL_GATHER"):
        collectives(TEXT.replace('"ALL_REDUCE"', '"ALL_TO_SOME"'))
    assert crossing_kind("send(%a, %token), channel_id=1, is_host_transfer=true") is None
