"""A state of a few arrays, of all kinds that a run's has, that is the same on every mesh."""

from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    model_state: Any


_SPECS = State(
    step=P(),
    params={
        "image": {"kernel": P(None, "fsdp", "tensor"), "embedding": P(("fsdp", "tensor"))},
        "scale": P("fsdp"),
    },
    opt_state=({"count": P(), "mu": P("data", "fsdp")}, ()),
    model_state={},
)


def values(step: int) -> State:
    """On the host; each step has other values."""
    rng = np.random.default_rng(step)
    params = {
        "image": {
            "kernel": rng.standard_normal((3, 64, 16)).astype(np.float32),
            "embedding": rng.standard_normal((32, 4)).astype(np.float32),
        },
        "scale": rng.standard_normal(8).astype(ml_dtypes.bfloat16),
    }
    moments = {
        "count": np.array(step, np.int32),
        "mu": rng.standard_normal((8, 512)).astype(np.float32),
    }
    return State(np.array(step, np.int32), params, (moments, ()), {})


def state_on(mesh: Mesh, step: int) -> State:
    """`values` on the devices; every process makes its own part of it."""

    def put(value: Any, spec: P) -> jax.Array:
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(np.shape(value), sharding, lambda i: value[i])

    return jax.tree.map(put, values(step), _SPECS)


def abstract_on(mesh: Mesh) -> State:
    return jax.tree.map(
        lambda value, spec: jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=NamedSharding(mesh, spec)
        ),
        values(0),
        _SPECS,
    )


def is_step(state: State, step: int) -> bool:
    """Whether every part that this process holds is, to the bit, that of `values(step)`."""

    def same(array: jax.Array, value: Any) -> bool:
        return array.dtype == value.dtype and all(
            np.array_equal(np.asarray(shard.data), value[shard.index])
            for shard in array.addressable_shards
        )

    return jax.tree.all(jax.tree.map(same, state, values(step)))
