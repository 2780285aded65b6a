"""The train step on one device and on eight."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from small import mesh_of, small_batch, small_config, small_model

from clip_jax.config import ImageTowerConfig, LoggingConfig, OptimizerConfig, StartConfig
from clip_jax.parallel import to_global_batch
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer, make_schedule
from clip_jax.training.state import abstract_state, init_state
from clip_jax.training.step import make_train_step

NUM_STEPS = 10


@functools.cache
def run(*sizes):
    config, mesh = small_config(), mesh_of(*sizes)
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
    return run()


def test_it_learns_and_compiles_once(one_device):
    losses, state, step, metrics, _ = one_device
    assert losses[-1] < losses[0] - 0.5
    assert step._cache_size() == 1
    assert int(state.step) == NUM_STEPS
    assert set(metrics) >= {"loss", "gradient_norm", "learning_rate", "logit_scale"}


def test_state_stays_where_the_table_puts_it(one_device):
    """tests/parity/test_meshes.py has all meshes, over more steps."""
    losses, state, _, _, abstract = run(2, 2, 2)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
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


def test_an_update_that_is_not_finite_changes_nothing_but_the_counts():
    """A weight of NaN in one sample, then good batches: as if the bad one had not been."""
    config, mesh = small_config(), mesh_of()
    good = small_batch(config) | {"weight": np.ones(config.global_batch_size, np.float32)}
    weight = good["weight"].copy()
    weight[3] = np.nan
    states, metrics = steps(config, mesh, [good, good | {"weight": weight}, good])
    _, before, skipped, after = states
    for name in ("params", "model_state", "opt_state", "ema"):
        assert equal(getattr(before, name), getattr(skipped, name))
    assert not equal(skipped.params, after.params)
    assert [int(state.step) for state in states] == [0, 1, 2, 3]
    assert [state.skipped["in_row"] for state in states] == [0, 0, 1, 0]
    assert [state.skipped["total"] for state in states] == [0, 0, 1, 1]
    assert np.isnan(metrics[1]["loss"])
    assert [m["skipped_steps"] for m in metrics] == [0, 1, 1]
    # The learning rate follows the steps, skipped ones included.
    schedule = make_schedule(config)
    np.testing.assert_allclose(
        [m["learning_rate"] for m in metrics], [schedule(i) for i in range(3)], rtol=1e-6
    )


def test_layer_norms_are_those_of_the_layers():
    config = small_config(logging=LoggingConfig(layer_norms=True))
    (first, second), (metrics,) = steps(config, mesh_of(2, 2, 2), [small_batch(config)])
    blocks = jax.tree.leaves(first.params["image"]["blocks"])
    for layer, norm in enumerate(metrics["parameter_norm/image/blocks"]):
        squares = sum(np.square(leaf[layer]).sum() for leaf in blocks)
        assert norm == pytest.approx(squares**0.5, rel=1e-5)
    gradients = [v for k, v in metrics.items() if k.startswith("gradient_norm/")]
    whole = sum(np.square(norm).sum() for norm in gradients) ** 0.5
    assert whole == pytest.approx(metrics["gradient_norm"], rel=1e-5)
    norms = [tree.params["text"]["final_norm"] for tree in (first, second)]
    moved = jax.tree.leaves(jax.tree.map(np.subtract, *norms))
    norm = sum(np.square(change).sum() for change in moved) ** 0.5
    assert norm == pytest.approx(metrics["update_norm/text/final_norm"], rel=1e-3)


def train(config, mesh, *, num_steps=2):
    """The states before and after each step, on the host, and the losses."""
    batches = [small_batch(config, seed=i) for i in range(num_steps)]
    states, metrics = steps(config, mesh, batches)
    return states, [float(values["loss"]) for values in metrics]


def steps(config, mesh, batches):
    """The states before and after the step of each batch, and the metrics, on the host."""
    task = ContrastiveTask(config, mesh)
    optimizer, decay = make_optimizer(config, task.trainable), config.optimizer.ema_decay
    abstract = abstract_state(task, optimizer, mesh, ema=decay is not None)
    state = init_state(task, optimizer, abstract, seed=0)
    schedule = make_schedule(config)
    step = make_train_step(
        task,
        optimizer,
        schedule,
        abstract,
        mesh,
        seed=0,
        ema_decay=decay,
        with_layer_norms=config.logging.layer_norms,
    )
    states, metrics = [jax.tree.map(np.array, state)], []
    for batch in batches:
        state, values = step(state, to_global_batch(batch, mesh))
        states.append(jax.tree.map(np.array, state))
        metrics.append(jax.tree.map(np.array, values))
    assert step._cache_size() == 1
    return states, metrics


def test_a_locked_tower_stays_to_the_bit_and_has_no_moments():
    config = small_config(start=StartConfig(lock=("image",)))
    (first, *_, last), _ = train(config, mesh_of(2, 2, 2))
    assert equal(first.params["image"], last.params["image"])
    for part in ("text", "image_projection", "log_logit_scale"):
        assert not equal(first.params[part], last.params[part])
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(last.opt_state)
    ]
    assert any("/mu/text/" in path for path in paths)
    assert not any("/image/" in path for path in paths)


def test_the_moving_average_follows_its_formula():
    config = small_config(optimizer=OptimizerConfig(ema_decay=0.75, learning_rate=1e-2))
    (first, *states), _ = train(config, mesh_of(), num_steps=3)
    average = first.params
    for state in states:
        average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, average, state.params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), average, state.ema
        )


def loss_of(config, mesh):
    """The loss of one batch and the new model state, as in the first step."""
    task = ContrastiveTask(config, mesh)
    params, model_state = jax.jit(task.init)(jax.random.key(0))
    batch = to_global_batch(small_batch(config), mesh)
    loss, (model_state, _) = jax.jit(
        lambda p, s, b: task.loss(p, s, b, rng=jax.random.key(1), step=0)
    )(params, model_state, batch)
    return float(loss), jax.tree.map(np.array, model_state)


def test_dropped_patches_depend_on_neither_devices_nor_microbatches():
    model = small_model(image=dataclasses.replace(small_model().image, patch_dropout=0.5))
    config = small_config(model=model)
    dropped, _ = loss_of(config, mesh_of())
    for microbatches, mesh in ((1, (4, 2, 1)), (4, (2, 1, 2))):
        changed = dataclasses.replace(config, microbatches=microbatches)
        assert loss_of(changed, mesh_of(*mesh))[0] == pytest.approx(dropped, rel=1e-5)
    assert abs(loss_of(small_config(), mesh_of())[0] - dropped) > 1e-4


@pytest.mark.parametrize("batch_norm", ["global", "local"])
def test_batch_statistics_depend_on_the_batch_alone(batch_norm):
    image = ImageTowerConfig(
        kind="resnet",
        image_size=32,
        resnet_layers=(1, 1, 1, 1),
        width=4,
        num_heads=4,
        batch_norm=batch_norm,
        batch_norm_group_size=8,
    )
    config = small_config(model=small_model(image=image, image_projection="none"))
    one, one_state = loss_of(config, mesh_of())
    eight, eight_state = loss_of(config, mesh_of(2, 2, 2))
    assert eight == pytest.approx(one, rel=1e-4)
    assert any(leaf.any() for leaf in jax.tree.leaves(one_state["image"]["stem"]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one_state, eight_state
    )


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))
