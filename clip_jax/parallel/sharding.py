"""The one table of how parameters, optimizer state and batches lie on the mesh."""

import dataclasses
import functools
import logging
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax.parallel.mesh import BATCH_AXES

logger = logging.getLogger(__name__)

_WARN_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Rule:
    """Arrays whose path ends in `pattern` are split so.

    fsdp, tensor: dims in order of preference, counted from the end (-1 is the last), because
    stacked layers carry a leading layer axis. The first dim that divides is taken. Empty: not
    split over that axis.
    """

    pattern: str
    fsdp: tuple[int, ...] = ()
    tensor: tuple[int, ...] = ()


# The dims behind each pattern are those of `models/`: D width, N heads, H head width, F MLP width,
# V vocabulary, E embedding, P pixels of a patch, C channels. A vector is not worth splitting.
RULES: tuple[Rule, ...] = (
    Rule(r"qkv/kernel", fsdp=(-4, -1), tensor=(-2,)),  # D 3 N H
    Rule(r"qkv/bias", tensor=(-2,)),  # 3 N H
    Rule(r"(query|key)_norm/(scale|bias)"),  # H, the same for all heads
    Rule(r"pooling/(query|key|value)/kernel", fsdp=(-3, -1), tensor=(-2,)),  # D N H
    Rule(r"pooling/(query|key|value)/bias", tensor=(-2,)),  # N H
    Rule(r"pooling/key_value/kernel", fsdp=(-4, -1), tensor=(-2,)),  # D 2 N H
    Rule(r"pooling/key_value/bias", tensor=(-2,)),  # 2 N H
    Rule(r"out/kernel", fsdp=(-1, -2), tensor=(-3,)),  # N H D
    Rule(r"out/bias"),
    Rule(r"attention_scale|mlp_scale"),
    Rule(r"mlp/(up|gate)/kernel", fsdp=(-2, -1), tensor=(-1,)),  # D F
    Rule(r"mlp/(up|gate)/bias", tensor=(-1,)),  # F
    Rule(r"mlp/down/kernel", fsdp=(-1, -2), tensor=(-2,)),  # F D
    Rule(r"mlp/down/bias"),
    # Rows first: what a reduce-scatter leaves of them lies in one piece.
    Rule(r"token_embedding", fsdp=(-2, -1), tensor=(-2,)),  # V D
    Rule(r"position_embedding", fsdp=(-1,)),  # T D
    Rule(r"class_embedding|register_embedding|segment_embedding|probe"),
    Rule(r"pooler/kernel", fsdp=(-2, -1)),  # D D
    Rule(r"pooler/bias"),
    Rule(r"stem/project/kernel", fsdp=(-1, -2)),  # P D
    Rule(r"stem/project/bias"),
    Rule(r"(convolution_\d|shortcut_convolution)/kernel", fsdp=(-1, -2)),  # rows, columns, C, C
    Rule(r"(norm_\d|shortcut_norm)/(scale|bias|mean|var)"),  # batch norm: the last two are state
    Rule(r"(attention_|mlp_|embedding_|pre_|final_|pooling/)norm/(scale|bias)"),
    Rule(r"(image|text)_projection/(kernel|up/kernel|down/kernel)", fsdp=(-2, -1)),  # D E
    Rule(r"(image|text)_projection/bias"),
    Rule(r"log_logit_scale|logit_bias"),
    # Adafactor's second moments of a matrix: without its longer side (row), without its shorter
    # one (column). Those of attention have as many as heads.
    Rule(r"qkv/kernel/row", tensor=(-2,)),  # 3 N H
    Rule(r"qkv/kernel/column", fsdp=(-3,), tensor=(-1,)),  # D 3 N
    Rule(r"out/kernel/row", tensor=(-2,)),  # N H
    Rule(r"out/kernel/column", fsdp=(-1,), tensor=(-2,)),  # N D
    Rule(r"(?<!qkv/kernel/)(?<!out/kernel/)(row|column)"),
    Rule(r"step|count|skipped/(in_row|total)"),  # counters of steps
)
_PATTERNS = tuple(re.compile(rf"(?:^|.*/)(?:{rule.pattern})$") for rule in RULES)


def matching_rules(path: str) -> list[Rule]:
    """The rules for an array at `path` ('image/blocks/mlp/up/kernel'): there should be one."""
    return [rule for rule, pattern in zip(RULES, _PATTERNS, strict=True) if pattern.match(path)]


def partition_spec(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How the array at `path` is split over `mesh`. Raises KeyError where no rule knows it."""
    rules = matching_rules(path)
    if len(rules) != 1:
        raise KeyError(f"{len(rules)} sharding rules match {path}; parallel/sharding.py needs one")
    dims: list[str | None] = [None] * len(shape)
    for axis in ("tensor", "fsdp"):
        preferred = getattr(rules[0], axis)
        if mesh.shape[axis] == 1 or not preferred:
            continue
        for dim in preferred:
            if dims[dim] is None and shape[dim] % mesh.shape[axis] == 0:
                dims[dim] = axis
                break
        else:
            num_bytes = 4 * int(np.prod(shape))
            if num_bytes > _WARN_BYTES:
                _warn_replicated(path, tuple(shape), axis, mesh.shape[axis])
    return PartitionSpec(*dims)


@functools.cache
def _warn_replicated(path: str, shape: tuple[int, ...], axis: str, size: int) -> None:
    logger.warning("%s %s does not divide by %s = %d: kept whole", path, shape, axis, size)


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each array of `tree` (parameters, optimizer state, or both)."""

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def to_global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Each process's rows [B / processes, ...] to arrays [B, ...] sharded over the batch axes."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
