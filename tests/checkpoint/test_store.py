import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import mesh_of, small_config

from clip_jax.checkpoint import SKIP, CheckpointStore
from clip_jax.config import CheckpointConfig, UserError
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import abstract_state, init_state


def state_on(mesh):
    config = small_config()
    task, optimizer = ContrastiveTask(config, mesh), make_optimizer(config)
    abstract = abstract_state(task, optimizer, mesh)
    return abstract, init_state(task, optimizer, abstract, seed=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saved from eight devices, in the background."""
    abstract, state = state_on(mesh_of(2, 2, 2))
    folder = tmp_path_factory.mktemp("checkpoints")
    store = CheckpointStore(folder, CheckpointConfig(keep_latest=2, keep_every_steps=4))
    for step in (2, 4, 6, 8, 10):
        store.save(step, state, {"samples_seen": step})
    store.save(10, state, {"samples_seen": -1})  # saved already: nothing happens
    store.wait()
    yield store, abstract, state, folder
    store.close()


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))


def test_old_checkpoints_go_and_the_kept_ones_stay(saved):
    store, *_ = saved
    assert store.steps() == [4, 8, 10]
    assert store.latest_step() == 10
    assert store.metadata(8) == {"samples_seen": 8}
    assert store.metadata() == {"samples_seen": 10}


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 8, 1)])
def test_restores_on_another_mesh(saved, mesh):
    store, _, state, _ = saved
    abstract, _ = state_on(mesh_of(*mesh))
    restored = store.restore(abstract)
    assert equal(restored, state)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_skipped_leaves_are_not_read(saved):
    store, abstract, state, _ = saved
    skipped = jax.tree.map(lambda _: SKIP, abstract.opt_state)
    restored = store.restore(abstract._replace(opt_state=skipped))
    assert equal(restored.params, state.params)
    assert all(leaf is SKIP for leaf in jax.tree.leaves(restored.opt_state))


def test_misfits_and_missing_steps_are_one_line(saved, tmp_path):
    store, abstract, _, _ = saved
    other = abstract._replace(
        step=jax.ShapeDtypeStruct((3,), jnp.int32, sharding=abstract.step.sharding)
    )
    with pytest.raises(UserError, match=r"restored: step has shape \(\), not \(3,\); .*step 8"):
        store.restore(other)
    for wanted, problem in (
        (abstract._replace(model_state={"mean": abstract.step}), "it has no model_state/mean"),
        (abstract._replace(opt_state=()), r"it has opt_state/\S+, which"),
    ):
        with pytest.raises(UserError, match=problem):
            store.restore(wanted)
    with pytest.raises(UserError, match=r"no checkpoint of step 3 .*there are \[4, 8, 10\]"):
        store.restore(abstract, 3)
    empty = CheckpointStore(tmp_path)
    with contextlib.closing(empty), pytest.raises(UserError, match="no checkpoint in"):
        empty.restore(abstract)


def test_another_store_reads_what_was_saved(saved):
    _, abstract, state, folder = saved
    reader = CheckpointStore(folder)
    assert reader.latest_step() == 10
    assert equal(reader.restore(abstract, 4), state)
    reader.close()


def test_groups_load_on_the_host_whatever_the_model(saved):
    store, _, state, _ = saved
    groups = store.load(("step", "params"), 8)
    assert set(groups) == {"step", "params"}
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(groups))
    assert equal(groups["params"], state.params)
    with pytest.raises(UserError, match=r"checkpoint .*8 has no queue"):
        store.load(("queue",), 8)


def test_weights_without_optimizer_state_restore_where_it_is_skipped(saved, tmp_path):
    _, abstract, state, _ = saved
    host = jax.tree.map(np.asarray, state._asdict())
    with contextlib.closing(CheckpointStore(tmp_path)) as store:
        store.save(0, host | {"opt_state": ()}, {"samples_seen": 0})
        skipped = jax.tree.map(lambda _: SKIP, abstract.opt_state)
        restored = store.restore(abstract._replace(opt_state=skipped), 0)
        assert equal(restored.params, state.params)
        assert restored.opt_state is skipped
        with pytest.raises(UserError, match="it has no opt_state/"):
            store.restore(abstract, 0)
