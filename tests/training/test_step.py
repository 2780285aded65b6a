"""The train step on one device and on eight."""

import jax
import numpy as np
import pytest
from small import mesh_of, small_batch, small_config

from clip_jax.parallel import to_global_batch
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer, make_schedule
from clip_jax.training.state import abstract_state, init_state
from clip_jax.training.step import make_train_step

NUM_STEPS = 10


def run(mesh):
    config = small_config()
    task, optimizer = ContrastiveTask(config, mesh), make_optimizer(config)
    abstract = abstract_state(task, optimizer, mesh)
    state = init_state(task, optimizer, abstract, seed=0)
    step = make_train_step(task, optimizer, make_schedule(config), abstract, mesh, seed=0)
    losses = []
    for i in range(NUM_STEPS):
        batch = to_global_batch(small_batch(config, seed=i % 2), mesh)
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, batch)
        losses.append(float(jax.device_get(metrics["loss"])))
    return losses, state, step, metrics, abstract


@pytest.fixture(scope="module")
def one_device():
    return run(mesh_of())


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_eight_devices_give_the_losses_of_one(one_device, mesh):
    losses, _, step, _, _ = run(mesh_of(*mesh))
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    assert step._cache_size() == 1


def test_it_learns_and_compiles_once(one_device):
    losses, state, step, metrics, _ = one_device
    assert losses[-1] < losses[0] - 0.5
    assert step._cache_size() == 1
    assert int(state.step) == NUM_STEPS
    assert set(metrics) >= {"loss", "gradient_norm", "learning_rate", "logit_scale"}


def test_state_stays_where_the_table_puts_it():
    _, state, _, _, abstract = run(mesh_of(1, 4, 2))
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_the_state_is_donated():
    config, mesh = small_config(), mesh_of()
    task, optimizer = ContrastiveTask(config, mesh), make_optimizer(config)
    abstract = abstract_state(task, optimizer, mesh)
    state = init_state(task, optimizer, abstract, seed=0)
    step = make_train_step(task, optimizer, make_schedule(config), abstract, mesh, seed=0)
    step(state, to_global_batch(small_batch(config), mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
