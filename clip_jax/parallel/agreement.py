"""Decisions that all processes of a run must take alike."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.config import UserError

_Result = TypeVar("_Result")


def from_first_process(value: int) -> int:
    """The first process's value, on every process: files may look different on other hosts.

    value: of at most 90 bits. All processes must call it, in the same order.
    """
    if jax.process_count() == 1:
        return value
    # In pieces: JAX would cut an int64 off.
    mask = (1 << 30) - 1
    pieces = np.array([value >> 60, value >> 30 & mask, value & mask], np.int32)
    high, middle, low = map(int, multihost_utils.broadcast_one_to_all(pieces))
    return high << 60 | middle << 30 | low


def on_all_processes(work: Callable[[], _Result]) -> _Result:
    """What `work` returns here, if it succeeds on every process; else UserError on all of them.

    All processes must call it, in the same order; `work` itself must be no collective. Otherwise
    the process that fails would leave the others waiting in their next collective.
    """
    error = None
    try:
        result = work()
    except UserError as raised:
        error = raised
    if jax.process_count() > 1:
        failed_P = np.ravel(multihost_utils.process_allgather(np.int32(error is not None)))
        if error is None and failed_P.any():
            raise UserError(
                f"process {int(failed_P.argmax())} of {jax.process_count()} cannot go on; its own "
                "message says why"
            )
    if error is not None:
        raise error
    return result


def values_of_processes(value: int) -> list[int]:
    """A 32-bit value of each process, on every process. All must call it, in the same order."""
    if jax.process_count() == 1:
        return [value]
    # As two halves: JAX would turn a uint32 that does not fit into an int32.
    halves = np.array([value >> 16, value & 0xFFFF], np.int32)
    return [int(high) << 16 | int(low) for high, low in multihost_utils.process_allgather(halves)]
