"""Muon: momentum with its singular values brought to one, matrix by matrix of stacked blocks.

Shape suffixes: K matrices of one array (layers, and q, k and v of each), R rows, C columns.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax.parallel import partition_spec
from clip_jax.training.rates import map_with_path

Array = jax.Array

# Matrices of stacked blocks alone. Not those of attention pooling: its one query makes gradients
# of rank one, of which the iteration would blow up the rounding.
_MATRICES = re.compile(r"(image|text)/blocks/(attention/(qkv|out)|mlp/(up|gate|down))/kernel")
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steepest at 0 for five iterations
_ITERATIONS = 5
_RMS = 0.2  # of an update, as AdamW's is in practice: Liu et al. 2025, section 2.2


def is_muon_matrix(path: str) -> bool:
    """Whether the parameter at `path` is one that `scale_by_muon` orthogonalizes."""
    return _MATRICES.fullmatch(path) is not None


def scale_by_muon(
    momentum: float,
    *,
    otherwise: optax.GradientTransformation,
    dtype: Any,
    mu_dtype: Any,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for matrices of blocks, `otherwise` for all else.

    Nesterov momentum, orthogonalized, times 0.2 sqrt(max(rows, columns)): the root mean square of
    AdamW's updates, whose learning rate and weight decay carry over (Liu et al. 2025, "Muon is
    scalable", section 2.2). dtype: of the iterations; mu_dtype: of the momentum as it is kept.
    """
    muon = optax.chain(
        optax.trace(momentum, nesterov=True, accumulator_dtype=mu_dtype),
        optax.stateless(
            lambda updates, _: map_with_path(
                lambda path, update: orthogonal_update(path, update, dtype=dtype, mesh=mesh),
                updates,
            )
        ),
    )

    def labels(params: Any) -> Any:
        return map_with_path(
            lambda path, _: "muon" if is_muon_matrix(path) else "otherwise", params
        )

    return optax.partition({"muon": muon, "otherwise": otherwise}, labels)


def orthogonal_update(path: str, update: Array, *, dtype: Any, mesh: Mesh | None = None) -> Array:
    """An array of stacked matrices, each orthogonalized and scaled: float32, of the same shape."""
    matrices_KRC = to_matrices(path, update.astype(dtype))  # they travel in `dtype`
    K, R, C = matrices_KRC.shape
    if mesh is None or mesh.size == 1:
        update = from_matrices(path, orthogonalize(matrices_KRC), update.shape)
    else:
        # Each device takes whole matrices: no communication inside an iteration, and no matrix is
        # done twice. What is missing to a multiple of the devices is zeros, which stay zeros.
        own = partition_spec(path, update.shape, mesh)
        ways = [NamedSharding(mesh, spec) for spec in _ways(own)]
        matrices_KRC = jnp.pad(matrices_KRC, ((0, -K % mesh.size), (0, 0), (0, 0)))
        for sharding in ways:
            matrices_KRC = jax.lax.with_sharding_constraint(matrices_KRC, sharding)
        matrices_KRC = orthogonalize(matrices_KRC)
        for sharding in reversed(ways):
            matrices_KRC = jax.lax.with_sharding_constraint(matrices_KRC, sharding)
        update = from_matrices(path, matrices_KRC[:K], update.shape)
        update = jax.lax.with_sharding_constraint(update, NamedSharding(mesh, own))
    return update.astype(jnp.float32) * (_RMS * math.sqrt(max(R, C)))


def _ways(own: PartitionSpec) -> list[PartitionSpec]:
    """From matrices [K, R, C] split as their parameter to whole ones on each device, axis by axis.

    One all-to-all over fsdp, one over tensor, a slice for data: of a single jump the partitioner
    makes an all-gather of all matrices.
    """
    ndim = len(own)
    rows, columns = ((1,), (3, 4)) if ndim == 5 else (range(1, ndim - 1), (ndim - 1,))
    split = [{own[dim] for dim in dims} for dims in (rows, columns)]
    fsdp, tensor = (
        [axis if axis in names else None for names in split] for axis in ("fsdp", "tensor")
    )
    return [
        PartitionSpec(None, *(a or b for a, b in zip(fsdp, tensor, strict=True))),
        PartitionSpec("fsdp", *tensor),
        PartitionSpec(("fsdp", "tensor")),
        PartitionSpec(("fsdp", "tensor", "data")),
    ]


def to_matrices(path: str, stacked: Array) -> Array:
    """[layers, ...] to [K, R, C]: inputs by outputs; q, k and v apart."""
    if path.endswith("qkv/kernel"):  # layers, D, 3, N, H
        layers, D, three, N, H = stacked.shape
        return jnp.moveaxis(stacked, 2, 1).reshape(layers * three, D, N * H)
    return stacked.reshape(len(stacked), -1, stacked.shape[-1])  # layers, N, H, D: the heads merge


def from_matrices(path: str, matrices_KRC: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `to_matrices`, for an array of `shape`."""
    if path.endswith("qkv/kernel"):
        layers, D, three, N, H = shape
        return jnp.moveaxis(matrices_KRC.reshape(layers, three, D, N, H), 1, 2)
    return matrices_KRC.reshape(shape)


def orthogonalize(x_KRC: Array) -> Array:
    """Each matrix with singular values near 1 in place of its own (0.7 to 1.2), in its dtype.

    Five Newton-Schulz iterations of an odd quintic polynomial on the matrix scaled to norm one
    (Jordan et al. 2024; optax.contrib.muon). Values below a thousandth of the norm stay below 0.7,
    and zeros stay zeros.
    """
    tall = x_KRC.shape[1] > x_KRC.shape[2]
    if tall:  # the products are of the shorter side
        x_KRC = x_KRC.swapaxes(1, 2)
    norm_K11 = jnp.linalg.norm(x_KRC.astype(jnp.float32), axis=(1, 2), keepdims=True)
    # Below 1e-15 squares underflow: such a matrix is as good as zero.
    x_KRC = (x_KRC / jnp.maximum(norm_K11, 1e-15)).astype(x_KRC.dtype)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram_KRR = x_KRC @ x_KRC.swapaxes(1, 2)
        x_KRC = a * x_KRC + (b * gram_KRR + c * gram_KRR @ gram_KRR) @ x_KRC
    return x_KRC.swapaxes(1, 2) if tall else x_KRC
