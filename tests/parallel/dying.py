"""One of several processes that meet in a collective, until one of them is made to end.

python dying.py RANK COUNT PORT HEARTBEAT_SECONDS FAULT FAULTY_RANK
"""

import os
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.config import UserError
from clip_jax.parallel import ending_together, start_processes


def main() -> None:
    rank, count, port, heartbeat_seconds = (int(x) for x in sys.argv[1:5])
    fault, faulty = sys.argv[5], int(sys.argv[6])
    start_processes(f"localhost:{port}", count, rank, heartbeat_seconds=heartbeat_seconds)
    with ending_together(heartbeat_seconds):
        for step in range(10_000):
            multihost_utils.process_allgather(np.int32(step))
            if step == 3:
                print("ready", flush=True)
            if step == 5 and fault == "none":
                break
            if step < 5 or rank != faulty:
                continue
            if fault == "user error":
                raise UserError("the disk is full")
            if fault == "error":
                raise RuntimeError("a fault of ours")
        if fault == "none" and rank != faulty:
            time.sleep(1.5)  # the others are done by now
    print(f"finished {jax.process_index()}", flush=True)
    # JAX's orderly end would wait for the others, and no connection close before theirs.
    os._exit(0)


if __name__ == "__main__":
    main()
