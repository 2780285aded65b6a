"""How a step's arrays lie on the mesh while it computes: weights gathered, activations by row.

Left to itself, XLA's partitioner splits products along the dims that the weights are split over,
and moves activations instead: many times the bytes, and gigabytes of memory.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax.parallel.mesh import BATCH_AXES
from clip_jax.parallel.sharding import partition_spec

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Layout:
    """What models ask of a mesh (`models.execution.Layout`), where it has more than one device."""

    mesh: Mesh

    @property
    def gathers(self) -> bool:
        """Whether weights are split over fsdp, so that each use gathers them."""
        return self.mesh.shape["fsdp"] > 1

    def rows(self, x_B: Array) -> Array:
        """`x_B` [B, ...], by rows over data and fsdp and whole otherwise."""
        sharding = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
        return jax.lax.with_sharding_constraint(x_B, sharding)

    def all_rows(self, x_B: Array) -> Array:
        """`x_B` [B, ...], by rows over all axes where they divide: for layers that `tensor` does

        not split, which each of its devices would compute for the same rows.
        """
        if len(x_B) % self.mesh.size:
            return self.rows(x_B)
        sharding = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        return jax.lax.with_sharding_constraint(x_B, sharding)

    def look_up(self, table_VD: Array, tokens_B: Array) -> Array:
        """Rows of a `token_embedding` [V, D] for integers [B, ...]: [B, ..., D].

        Each device looks up its own rows in the table gathered over fsdp, and adds their gradients
        into a table of its own, which are then summed. Where `tensor` splits the vocabulary, one of
        its devices has the row and the others add zeros. XLA's partitioner would send all about.
        """
        split = partition_spec("token_embedding", table_VD.shape, self.mesh)
        if not any(split):
            return table_VD[tokens_B]

        def local(part_VD: Array, tokens_b: Array) -> Array:
            # Varying over data before it is gathered: so gradients are summed over fsdp first.
            part_VD = jax.lax.pcast(part_VD, ("data",), to="varying")
            if "fsdp" in split:
                dim = split.index("fsdp")
                part_VD = jax.lax.all_gather(part_VD, "fsdp", axis=dim, tiled=True)
            if "tensor" not in split:
                return part_VD[tokens_b]
            row_b = tokens_b - jax.lax.axis_index("tensor") * len(part_VD)
            is_here_b = (row_b >= 0) & (row_b < len(part_VD))
            x_bD = part_VD[jnp.where(is_here_b, row_b, 0)]
            return jax.lax.psum(jnp.where(is_here_b[..., None], x_bD, 0), "tensor")

        rows = PartitionSpec(BATCH_AXES)
        sharded = jax.shard_map(local, mesh=self.mesh, in_specs=(split, rows), out_specs=rows)
        return sharded(table_VD, tokens_B)

    def whole(self, tree: Any, *, dtype: Any = None) -> Any:
        """`tree` with what fsdp splits gathered; splits over tensor stay.

        dtype: that kernels are cast to before they travel, as their gradients do; None: theirs.
        Going backward, gradients are summed straight into the split arrays.
        """
        if not self.gathers:
            return tree

        def one(path: tuple[Any, ...], leaf: Array) -> Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
            split = partition_spec(name, leaf.shape, self.mesh)
            if "fsdp" not in split:
                return leaf
            whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in split))
            shardings = (NamedSharding(self.mesh, split), NamedSharding(self.mesh, whole))
            if dtype is not None and name.endswith("kernel"):
                leaf = leaf.astype(dtype)
            return _gather(leaf, *shardings)

        return jax.tree_util.tree_map_with_path(one, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: Array, split: NamedSharding, whole: NamedSharding) -> Array:
    # Both constraints: else the cast before it may move behind the gather, at twice the bytes.
    x = jax.lax.with_sharding_constraint(x, split)
    return jax.lax.with_sharding_constraint(x, whole)


def _gather_forward(x: Array, split: NamedSharding, whole: NamedSharding) -> tuple[Array, None]:
    return _gather(x, split, whole), None


def _gather_backward(
    split: NamedSharding, whole: NamedSharding, _: None, gradient: Array
) -> tuple[Array]:
    # A constraint's own transpose would sum them whole on each device first.
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gather.defvjp(_gather_forward, _gather_backward)
