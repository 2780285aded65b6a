"""Norms of parameters, gradients and updates, layer by layer."""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def layer_norms(params: Any, gradients: Any, updates: Any) -> dict[str, Array]:
    """`parameter_norm/PART`, `gradient_norm/PART` and `update_norm/PART` of each part of a model.

    A part is a stack of blocks ('image/blocks': float32 [layers], one norm for each) or what stands
    beside it on the same level ('image/stem', 'log_logit_scale': a scalar).
    """
    return {
        f"{kind}_norm/{part}": jnp.sqrt(sum(squares))
        for kind, tree in (("parameter", params), ("gradient", gradients), ("update", updates))
        for part, squares in _squares(tree).items()
    }


def _squares(tree: Any) -> dict[str, list[Array]]:
    """Sums of squares of the arrays of each part; over all axes but that of the layers."""
    parts: dict[str, list[Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [str(entry.key) for entry in path[:2]]
        axes = range(names[-1] == "blocks", leaf.ndim)
        square = jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=tuple(axes))
        parts.setdefault("/".join(names), []).append(square)
    return parts
