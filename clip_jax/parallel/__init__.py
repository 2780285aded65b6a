"""Mesh, multi-host start-up, and the table of sharding rules."""

from clip_jax.parallel.agreement import (
    from_first_process,
    on_all_processes,
    values_of_processes,
)
from clip_jax.parallel.mesh import (
    BATCH_AXES,
    MESH_AXES,
    check_rows_of_processes,
    make_mesh,
    start_processes,
)
from clip_jax.parallel.sharding import (
    RULES,
    batch_sharding,
    matching_rules,
    partition_spec,
    replicated,
    state_shardings,
    to_global_batch,
)

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "RULES",
    "batch_sharding",
    "check_rows_of_processes",
    "from_first_process",
    "make_mesh",
    "matching_rules",
    "on_all_processes",
    "partition_spec",
    "replicated",
    "start_processes",
    "state_shardings",
    "to_global_batch",
    "values_of_processes",
]
