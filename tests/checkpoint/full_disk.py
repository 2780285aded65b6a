"""Fills the disk under a run: `python full_disk.py FOLDER`, on a file system of 16 MB."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from small import mesh_of

from clip_jax.checkpoint import CheckpointStore
from clip_jax.config import CheckpointConfig, UserError

folder = Path(sys.argv[1])
mesh = mesh_of(1)
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def state(step: int) -> dict[str, jax.Array]:
    noise = np.random.default_rng(step).standard_normal(2**19)  # 4 MB of float64
    return {"params": jax.device_put(noise.astype(np.float32).repeat(2), sharding)}


def is_step(step: int) -> bool:
    return bool(np.array_equal(store.load(("params",), step)["params"], state(step)["params"]))


store = CheckpointStore(folder / "checkpoints", CheckpointConfig(keep_latest=2))
store.save(1, state(1), {})
store.wait()
filler = folder / "filler"
filler.write_bytes(bytes(9 * 2**20))
errors = []
for notice in (store.wait, lambda: store.save(4, state(4), {})):
    try:
        store.save(len(errors) + 2, state(2), {})
        notice()
    except UserError as error:
        errors.append(str(error))
full = {"steps": store.steps(), "good": is_step(1), "problems": store.verify(1)}
names = sorted(path.name for path in (folder / "checkpoints").iterdir())
filler.unlink()
store.save(5, state(5), {})
store.wait()
after = {"steps": store.steps(), "good": is_step(5)}
store.close()
print(json.dumps({"errors": errors, "full": full, "names": names, "after": after}))
