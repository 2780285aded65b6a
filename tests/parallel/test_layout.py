"""What a sharded loss and its gradients send, read from the program compiled for eight devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import mesh_of, small_batch, small_config, small_model

from clip_jax.config import ImageTowerConfig
from clip_jax.parallel import Layout, batch_sharding
from clip_jax.planning import Program
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import abstract_state

ROWS = 11  # of a device: a number that no weight has
SCANNED = 2  # blocks of each tower; the last one comes after the scan


def program_of(mesh, **changes):
    """The compiled loss with gradients, and the shapes of all parameters."""
    batch = ROWS * mesh.shape["data"] * mesh.shape["fsdp"]
    model = small_model()
    image, text = (dataclasses.replace(x, depth=SCANNED + 1) for x in (model.image, model.text))
    model = dataclasses.replace(model, image=image, text=text)
    config = small_config(global_batch_size=batch, model=model, **changes)
    task = ContrastiveTask(config, mesh)
    params = abstract_state(task, make_optimizer(config), mesh).params
    inputs = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh))
        for name, x in task.batch_spec().items()
    }

    def loss(params, inputs):
        return task.loss(params, {}, inputs, rng=jax.random.key(0), step=jnp.int32(0))[0]

    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    step = jax.jit(jax.grad(loss), out_shardings=shardings)
    return Program(step.lower(params, inputs).compile().as_text()), params


def moved(collective, kind):
    """Whether it is of this kind and moves arrays that have rows of the batch."""
    return collective.kind == kind and any(
        size and size % ROWS == 0 for _, dims in collective.shapes for size in dims
    )


@pytest.fixture(scope="module")
def over_fsdp():
    mesh = mesh_of(fsdp=8)
    return mesh, *program_of(mesh)


@pytest.fixture(scope="module")
def over_all_axes():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    return mesh, *program_of(mesh)


@pytest.mark.parametrize("program", ["over_fsdp", "over_all_axes"])
def test_weights_travel_and_activations_stay(program, request):
    mesh, program, params = request.getfixturevalue(program)
    for collective in program.collectives:
        assert not moved(collective, "all-gather"), collective
        assert not moved(collective, "all-to-all"), collective
        if moved(collective, "all-reduce"):  # the partial sums of a product split over heads
            # Over one device each: nothing is sent.
            assert collective.axes(mesh.shape) in (("tensor",), ()), collective
    split = (
        sum(leaf.size for leaf in jax.tree.leaves(params) if "fsdp" in leaf.sharding.spec)
        // mesh.shape["tensor"]
    )
    gathered = sum(
        c.times * c.num_bytes // 4
        for c in program.collectives
        if c.kind == "all-gather" and c.axes(mesh.shape) == ("fsdp",)
    )
    # Forward all of them; backward those of the blocks once more.
    assert split <= gathered <= 2.05 * split


def test_gathered_weights_are_dropped_after_their_layer(over_fsdp):
    """They are gathered a layer at a time, and again going backward."""
    _, program, _ = over_fsdp
    blocks = [c for c in program.collectives if c.kind == "all-gather" and "while" in c.op_name]
    assert {c.times for c in blocks} == {SCANNED}
    again = [c for c in blocks if "rematted_computation" in c.op_name]
    assert len(again) == len(blocks) / 2


def test_a_row_of_a_split_table_is_that_of_the_whole_one():
    """Values and gradients, with the vocabulary over tensor and fsdp, and repeated tokens."""
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    rng = np.random.default_rng(0)
    table = rng.standard_normal((12, 6)).astype(np.float32)
    tokens = rng.integers(0, 12, (8, 5)).astype(np.int32)
    weights = rng.standard_normal((8, 5, 6)).astype(np.float32)

    def total(table, look_up):
        return (look_up(table, tokens) * weights).sum()

    plain = jax.value_and_grad(lambda t: total(t, lambda t, i: t[i]))(table)
    ours = jax.jit(jax.value_and_grad(lambda t: total(t, Layout(mesh).look_up)))(table)
    np.testing.assert_allclose(ours[0], plain[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], plain[1], rtol=1e-5, atol=1e-6)


def test_kernels_travel_in_the_dtype_of_the_products():
    mesh = mesh_of(fsdp=8)
    tree = {"mlp": {"up": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}}}
    whole = Layout(mesh).whole(tree, dtype=jnp.bfloat16)
    assert whole["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert whole["mlp"]["up"]["bias"].dtype == jnp.float32
    assert dataclasses.replace(Layout(mesh_of()), mesh=mesh_of()).whole(tree) is tree


def test_rows_over_all_axes_where_they_divide():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    for num, expected in ((16, ("data", "fsdp", "tensor")), (12, ("data", "fsdp"))):
        x = jax.jit(Layout(mesh).all_rows)(jnp.ones((num, 3)))
        assert x.sharding.spec[0] == expected


@pytest.mark.slow
def test_a_resnet_has_the_gradients_of_one_device():
    """Its convolutions take other rows on each device of the tensor axis."""
    image = ImageTowerConfig(
        kind="resnet",
        image_size=64,
        patch_size=32,
        resnet_layers=(1, 1, 1, 1),
        width=8,
        num_heads=4,
        class_token=False,
    )
    config = small_config(global_batch_size=16, model=small_model(image=image))
    batch, found = small_batch(config), []
    for mesh in (mesh_of(), mesh_of(data=2, fsdp=2, tensor=2)):
        task = ContrastiveTask(config, mesh)
        params, model_state = task.init(jax.random.key(0))
        gradient = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
        (loss, (state, _)), gradients = gradient(
            params, model_state, batch, rng=jax.random.key(1), step=jnp.int32(0)
        )
        found.append(jax.device_get((loss, state, gradients)))
    for one, eight in zip(*map(jax.tree.leaves, found), strict=True):
        # Batch norm divides by deviations of a few values: relative to the array's largest.
        np.testing.assert_allclose(eight, one, atol=1e-4 * max(np.abs(one).max(), 1e-3))
