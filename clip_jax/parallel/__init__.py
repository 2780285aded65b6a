"""Mesh, multi-host start-up, and the table of sharding rules."""

from clip_jax.parallel.agreement import (
    from_first_process,
    on_all_processes,
    values_of_processes,
)
from clip_jax.parallel.cluster import start_processes
from clip_jax.parallel.layout import Layout
from clip_jax.parallel.mesh import (
    BATCH_AXES,
    MESH_AXES,
    check_rows_of_processes,
    make_mesh,
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
from clip_jax.parallel.together import ending_together

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "RULES",
    "Layout",
    "batch_sharding",
    "check_rows_of_processes",
    "ending_together",
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
