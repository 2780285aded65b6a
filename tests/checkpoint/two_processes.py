"""One of two processes of four devices: saves, restores on other meshes, and meets damage.

`python two_processes.py PROCESS PORT FOLDER` prints what it found as JSON.
"""

import json
import logging
import sys
from pathlib import Path

import jax
from checkpoint.states import abstract_on, is_step, state_on, values
from jax.experimental import multihost_utils
from small import mesh_of

from clip_jax.checkpoint import CheckpointStore, record
from clip_jax.config import CheckpointConfig, UserError

process, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, process)

record._LARGE_BYTES = 0  # files of arrays are checked by what is read of them alone

said: list[str] = []
handler = logging.Handler()
handler.emit = lambda line: said.append(line.getMessage())  # type: ignore[method-assign]
logging.getLogger("clip_jax").addHandler(handler)

found: dict[str, object] = {}
mesh = mesh_of(2, 2, 2)
store = CheckpointStore(folder, CheckpointConfig(keep_latest=3))
for step in (1, 2, 3):
    store.save(step, state_on(mesh, step), {"samples_seen": step})
store.wait()
found["steps"] = store.steps()
for shape in ((8, 1, 1), (1, 8, 1), (1, 1, 8)):
    step, state, metadata = store.restore_latest(abstract_on(mesh_of(*shape)))
    found[str(shape)] = [step, is_step(state, 3), metadata]

# What one process alone reads is no longer what it was: of `mu`, rows 4 to 7 are on process 1.
if process == 0:
    row = values(3).opt_state[0]["mu"][6, :64].tobytes()
    for file in (folder / "3" / "state").rglob("*"):
        if file.is_file() and row in (data := file.read_bytes()):
            changed = bytearray(data)
            changed[data.index(row)] ^= 1
            file.write_bytes(changed)
            found["hurt"] = True
multihost_utils.sync_global_devices("damage is done")
abstract = abstract_on(mesh_of(2, 4, 1))
try:
    store.restore(abstract, 3)
except UserError as error:
    found["refused"] = str(error)
step, state, metadata = store.restore_latest(abstract)
found["after"] = [step, is_step(state, 2), metadata]
found["left"] = store.steps()
found["said"] = said
store.close()
print(json.dumps(found))
