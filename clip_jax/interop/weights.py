"""A model out of its files: what every format reads into and writes from."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from clip_jax.checkpoint import leaves_by_path, unflatten
from clip_jax.config import ModelConfig
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.interop.table import NdArray, Shape
from clip_jax.models import CLIP

PARTS = ("image", "text")
ModuleT = TypeVar("ModuleT", bound=nnx.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Architecture, arrays and tokenizer of one model.

    arrays: by path ('image/blocks/mlp/up/kernel'), parameters and batch-norm statistics alike, in
    the dtypes of the files they came from. parts: the towers they are of; a whole model has both,
    with projections, scale and bias; a single tower has the arrays below its own name alone, and of
    `model` only that tower's settings count. extras: what a format must find again when it writes
    and no array holds (JSON values).
    """

    model: ModelConfig
    arrays: dict[str, NdArray]
    tokenizer: Tokenizer | None = None
    parts: tuple[str, ...] = PARTS
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)


@functools.lru_cache(maxsize=8)
def _abstract_paths(model: ModelConfig) -> dict[str, Shape]:
    abstract = jax.eval_shape(lambda key: CLIP(model, rngs=nnx.Rngs(key)), jax.random.key(0))
    return {path: tuple(leaf.shape) for path, leaf in flatten(nnx.state(abstract)).items()}


def model_shapes(model: ModelConfig, parts: tuple[str, ...] = PARTS) -> dict[str, Shape]:
    """The shapes of all arrays of `model`, or of one tower, by path; nothing is allocated."""
    shapes = _abstract_paths(model)
    if parts == PARTS:
        return dict(shapes)
    prefixes = tuple(f"{part}/" for part in parts)
    return {path: shape for path, shape in shapes.items() if path.startswith(prefixes)}


def with_arrays(abstract: ModuleT, arrays: Mapping[str, NdArray]) -> ModuleT:
    """A module of shapes (`jax.eval_shape`) with `arrays` in it, by path, as float32."""
    graphdef, state = nnx.split(abstract)
    filled = {path: jnp.asarray(array, jnp.float32) for path, array in arrays.items()}
    nnx.replace_by_pure_dict(state, unflatten(filled))
    module: ModuleT = nnx.merge(graphdef, state)
    return module


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of nested dicts (or an nnx state) by path, '/' between the names."""
    state = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    return leaves_by_path(state)


def is_statistic(path: str) -> bool:
    """Whether an array is batch-norm state, which training keeps beside the parameters."""
    return path.rsplit("/", 1)[-1] in ("mean", "var")
