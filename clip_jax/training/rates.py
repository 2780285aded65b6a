"""How fast each parameter learns relative to the schedule: by tower, by layer, or not at all."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.config import ExperimentConfig
from clip_jax.config.frozen import is_frozen

Trainable = Callable[[str], bool]

# What comes before the first block, inside a tower.
_EMBEDDINGS = re.compile(
    r"stem/.*|(class|position|register|token|segment)_embedding|(pre|embedding)_norm/.*"
)


def map_with_path(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` of a function that takes the leaf's path ('image/stem/project/kernel') too."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(
            jax.tree_util.keystr(path, simple=True, separator="/"), *leaves
        ),
        tree,
        *rest,
    )


def is_stacked(path: str) -> bool:
    """Whether the leading axis of the parameter is that of the layers."""
    return path.split("/")[1:2] == ["blocks"]


def learning_rate_factors(
    config: ExperimentConfig, params: Any, trainable: Trainable | None = None
) -> Any:
    """What the schedule is multiplied by: for each array a float32 scalar or [layers, 1, ...].

    0 is frozen. The embeddings of a tower of n blocks are its layer 0, block i is layer i + 1, the
    final norm goes with the last block, and all behind is layer n + 1 (as timm numbers them, after
    Bao et al. 2022, BEiT). Layer l learns at `multiplier * layer_decay**(n + 1 - l)`; where k =
    `frozen_layers` is above 0, layers 0 to k are frozen. Scale and bias of the logits: 1.

    trainable: which parameters train beside what the config says, by path; None: all.
    """

    def factor(path: str, leaf: Any) -> np.ndarray:
        if is_frozen(config, path) or not (trainable is None or trainable(path)):
            return np.zeros((), np.float32)
        return _factor(config, path, leaf.ndim)

    return map_with_path(factor, params)


def of_what_trains(gradients: Any, factors: Any) -> Any:
    """Gradients with zeros for frozen layers and parameters, whatever (NaN too) is there."""
    return jax.tree.map(
        lambda gradient, factor: gradient if factor.all() else jnp.where(factor > 0, gradient, 0),
        gradients,
        factors,
    )


def _factor(config: ExperimentConfig, path: str, ndim: int) -> np.ndarray:
    part, _, name = path.partition("/")
    tower = part.removesuffix("_projection")
    if tower not in ("image", "text"):
        return np.ones((), np.float32)
    rates, model = getattr(config.optimizer, tower), getattr(config.model, tower)
    depth, layer = model.depth, np.asarray(model.depth + 1)
    if part == tower and _EMBEDDINGS.fullmatch(name):
        layer = np.asarray(0)
    elif part == tower and is_stacked(path):
        layer = np.arange(1, depth + 1).reshape(-1, *(1,) * (ndim - 1))
    elif name.startswith("final_norm/") and not getattr(model, "norm_after_pooling", False):
        layer = np.asarray(depth)
    factor = rates.multiplier * rates.layer_decay ** (depth + 1.0 - layer)
    if rates.frozen_layers:
        factor = np.where(layer <= rates.frozen_layers, 0.0, factor)
    return np.asarray(factor, np.float32)
