"""The compiled ring: its route, its FLOPs, its traffic, and that no B x B array is in it."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from clip_jax.objectives import contrastive_loss
from clip_jax.objectives.ring import ring_permutation
from clip_jax.planning import Program


@pytest.mark.parametrize("sizes", [(1,), (8,), (4, 2), (2, 2, 2), (3, 4), (4, 4)])
def test_the_ring_visits_all_devices_neighbour_to_neighbour(sizes):
    permutation = dict(ring_permutation(sizes))
    device, seen = 0, []
    for _ in permutation:
        seen.append(device)
        device = permutation[device]
    assert device == 0
    assert sorted(seen) == list(range(len(permutation)))

    def place(index: int) -> list[int]:
        digits = []
        for size in reversed(sizes):
            digits.append(index % size)
            index //= size
        return digits

    for here, there in itertools.pairwise(seen):
        steps = [abs(a - b) for a, b in zip(place(here), place(there), strict=True)]
        assert sum(steps) == 1


@pytest.mark.parametrize(
    ("kind", "needed", "rounds"), [("softmax", 8, 2), ("sigmoid", 6, 1)], ids=["softmax", "sigmoid"]
)
def test_flops_traffic_and_arrays_of_the_compiled_program(kind, needed, rounds):
    num_devices, rows, width = 4, 256, 32
    batch = num_devices * rows
    mesh = jax.make_mesh(
        (4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_devices]
    )
    split, whole = PartitionSpec("data"), PartitionSpec()
    loss = jax.shard_map(
        lambda *inputs: contrastive_loss(*inputs, kind=kind, axis_names="data", tile_size=64),
        mesh=mesh,
        in_specs=(split, split, whole, whole),
        out_specs=whole,
    )
    embeddings = jax.ShapeDtypeStruct(
        (batch, width), jnp.float32, sharding=NamedSharding(mesh, split)
    )
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, whole))
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    compiled = gradient.lower(embeddings, embeddings, scalar, scalar).compile()
    program = Program(compiled.as_text())

    assert num_devices * program.flops <= 1.05 * needed * batch**2 * width
    assert num_devices * program.flops >= 0.95 * needed * batch**2 * width  # all were counted
    least = 4 * rows * width * (rounds * (num_devices - 1) + num_devices)
    statistics = 4 * rows * 3 * num_devices * rounds  # vectors of the columns: small at width 512
    assert sum(c.sent_bytes for c in program.collectives) <= 1.05 * least + statistics
    assert {c.kind for c in program.collectives} == {"collective-permute", "all-reduce"}
    assert max(c.num_elements for c in program.collectives) == rows * width
    assert program.largest_array == rows * width  # a tile is 64 x 64
