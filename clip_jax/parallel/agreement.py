"""Decisions that all processes of a run must take alike."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def from_first_process(value: int) -> int:
    """The first process's value, on every process: files may look different on other hosts.

    All processes must call it, in the same order.
    """
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
