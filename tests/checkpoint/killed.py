"""Saves in a loop until it is killed: `python killed.py FOLDER`, a line on stdin for each trial.

The imports are made once and each trial is a fork, which starts JAX anew.
"""

import os
import random
import signal
import sys
import time

import jax
from checkpoint.states import state_on
from small import mesh_of

from clip_jax.checkpoint import CheckpointStore
from clip_jax.config import CheckpointConfig

folder = sys.argv[1]


def save_for_ever() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    config = CheckpointConfig(keep_latest=2, keep_every_steps=10)
    store = CheckpointStore(folder, config)
    mesh = mesh_of(2, 2, 2)
    step = store.latest_step() or 0
    while True:
        step += 1
        store.save(step, state_on(mesh, step), {"samples_seen": step})
        os.write(1, b".")


for line in sys.stdin:
    trial = int(line)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        save_for_ever()
    os.close(writing)
    for _ in range(2 + trial % 3):  # saves have begun: all before the last of them are complete
        os.read(reading, 1)
    time.sleep(random.Random(trial).uniform(0, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    print(trial, flush=True)
