import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import mesh_of, small_config

from clip_jax.config import OptimizerConfig, ScheduleConfig
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import decay_mask, make_optimizer, make_schedule


def test_warmup_then_cosine_to_the_end_fraction():
    config = dataclasses.replace(
        small_config(),
        num_steps=100,
        optimizer=OptimizerConfig(learning_rate=2.0),
        schedule=ScheduleConfig(warmup_steps=10, end_fraction=0.1),
    )
    rate = make_schedule(config)
    np.testing.assert_allclose([rate(i) for i in (0, 4, 9, 10)], [0.2, 1.0, 2.0, 2.0], rtol=1e-6)
    # Half way down: the mean of peak and end. The step after the last would be the end itself.
    np.testing.assert_allclose([rate(55), rate(100)], [1.1, 0.2], rtol=1e-6)


def test_no_warmup_and_constant():
    config = dataclasses.replace(
        small_config(), schedule=ScheduleConfig(name="constant", warmup_steps=0)
    )
    assert make_schedule(config)(0) == make_schedule(config)(9) == pytest.approx(5e-4)


def test_weight_decay_pulls_matrices_alone():
    task = ContrastiveTask(small_config(), mesh_of())
    params, _ = task.init(jax.random.key(0))
    mask = decay_mask(params)
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, decays in jax.tree_util.tree_leaves_with_path(mask)
        if decays
    }
    blocks = {
        f"{tower}/blocks/{name}/kernel"
        for tower in ("image", "text")
        for name in ("attention/qkv", "attention/out", "mlp/up", "mlp/down")
    }
    assert decayed == blocks | {
        "image/stem/project/kernel",
        "text/token_embedding",
        "image_projection/kernel",
        "text_projection/kernel",
    }


def test_an_update_is_adamw():
    """One step by hand: bias-corrected moments of a first gradient give its sign."""
    config = dataclasses.replace(
        small_config(),
        optimizer=OptimizerConfig(
            learning_rate=0.1, weight_decay=0.5, epsilon=1e-12, clip_global_norm=None
        ),
        schedule=ScheduleConfig(name="constant", warmup_steps=0),
    )
    optimizer = make_optimizer(config)
    params = {"mlp": {"kernel": jnp.array([2.0, -3.0]), "bias": jnp.array([4.0])}}
    gradients = {"mlp": {"kernel": jnp.array([5.0, -0.1]), "bias": jnp.array([-7.0])}}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["mlp"]["kernel"], [-0.1 - 0.1, 0.1 + 0.15], rtol=1e-5)
    np.testing.assert_allclose(updates["mlp"]["bias"], [0.1], rtol=1e-5)
