"""The sharded task against itself on one device, and against the dense loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import mesh_of, small_batch, small_config, small_model

from clip_jax.config import ConfigError, LossConfig, OptimizerConfig, StartConfig
from clip_jax.config.schema import PackingConfig
from clip_jax.data.packing import pack_captions
from clip_jax.data.text_inputs import text_ids
from clip_jax.models import Execution, forward_flops
from clip_jax.objectives import dense_softmax_contrastive_loss
from clip_jax.parallel import to_global_batch
from clip_jax.tasks import ContrastiveTask


def with_packing(config, group_size, rows):
    packing = PackingConfig(group_size=group_size, rows=rows)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, packing=packing))


def packed(config, batch):
    """The same batch with its captions packed, as `data.text_inputs.PackedText` does it."""
    packing, text = config.data.packing, config.model.text
    ends = (batch["tokens"] == text.eot_id).argmax(axis=1)
    ids = [row[: end + 1].tolist() for row, end in zip(batch["tokens"], ends, strict=True)]
    rows = pack_captions(
        ids,
        group_size=packing.group_size,
        rows=packing.rows,
        row_length=text.context_length,
        pad_id=text.pad_id,
    )
    assert rows.num_cut == 0
    arrays = {"tokens": rows.tokens, "segments": rows.segments, "eot": rows.eot}
    return batch | arrays | {"text_id": text_ids(ids)}


def loss_and_gradients(config, mesh, batch):
    task = ContrastiveTask(config, mesh)
    params, _ = jax.jit(task.init)(jax.random.key(0))

    @jax.jit
    def run(params, batch):
        def loss(params):
            return task.loss(params, {}, batch, rng=jax.random.key(0), step=jnp.int32(0))

        (value, (_, metrics)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, metrics, gradients

    return jax.device_get(run(params, to_global_batch(batch, mesh)))


@pytest.fixture(scope="module")
def one_device():
    config = small_config()
    return config, small_batch(config), loss_and_gradients(config, mesh_of(), small_batch(config))


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ((8, 1, 1), {}),
        ((2, 2, 2), {}),
        ((2, 1, 1), {"microbatches": 4}),
        ((1, 1, 1), {"remat": "full"}),
        ((1, 1, 1), {"remat": "dots"}),
        ((2, 2, 2), {"layers": "unroll"}),
    ],
)
def test_mesh_microbatches_and_remat_change_nothing(one_device, mesh, changes):
    config, batch, (loss, metrics, gradients) = one_device
    other = loss_and_gradients(dataclasses.replace(config, **changes), mesh_of(*mesh), batch)
    np.testing.assert_allclose(other[0], loss, rtol=1e-6)
    assert other[1].keys() == metrics.keys()
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradients)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * norm), other[2], gradients
    )


@pytest.mark.parametrize(
    ("mesh", "group_size", "rows", "changes"),
    [
        # No two captions are equal: to exclude those that are changes nothing.
        ((8, 1, 1), 4, 4, {"loss": LossConfig(duplicates="exclude")}),
        ((2, 2, 2), 2, 2, {"microbatches": 4, "remat": "dots"}),
    ],
)
def test_packed_captions_change_nothing(one_device, mesh, group_size, rows, changes):
    config, batch, (loss, metrics, gradients) = one_device
    config = with_packing(dataclasses.replace(config, **changes), group_size, rows)
    other = loss_and_gradients(config, mesh_of(*mesh), packed(config, batch))
    np.testing.assert_allclose(other[0], loss, rtol=1e-6)
    assert other[1].keys() == metrics.keys()
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradients)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * norm), other[2], gradients
    )


def test_unrolled_layers_equal_the_scan(one_device):
    config, batch, (loss, _, gradients) = one_device
    task = ContrastiveTask(config, mesh_of(), execution=Execution(unroll_layers=True))
    params, _ = jax.jit(task.init)(jax.random.key(0))
    value, other = jax.jit(
        jax.value_and_grad(
            lambda p: task.loss(p, {}, batch, rng=jax.random.key(0), step=jnp.int32(0))[0]
        )
    )(params)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), other, gradients
    )


def test_bfloat16_is_close_and_returns_float32(one_device):
    config, batch, (loss, _, _) = one_device
    config = dataclasses.replace(config, precision="bfloat16")
    low, _, gradients = loss_and_gradients(config, mesh_of(), batch)
    assert loss != low
    np.testing.assert_allclose(low, loss, rtol=2e-2)
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {np.dtype("float32")}


def test_embeddings_are_unit_length_and_padding_after_the_end_is_ignored():
    config = small_config()
    task = ContrastiveTask(config, mesh_of())
    params, model_state = task.init(jax.random.key(0))
    batch = small_batch(config, num=4)
    embeddings = task.embed(params, model_state, batch)
    for name in ("image", "text"):
        assert embeddings[name].dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(embeddings[name], axis=1), 1, rtol=1e-6)
    after_end = np.cumsum(batch["tokens"] == config.model.text.eot_id, axis=1) > 0
    after_end[np.arange(4), np.argmax(after_end, axis=1)] = False
    assert after_end.any()
    changed = np.where(after_end, 5, batch["tokens"])
    other = task.embed(params, model_state, {"tokens": changed})
    np.testing.assert_allclose(other["text"], embeddings["text"], atol=1e-6)
    assert set(other) == {"text"}


def test_logit_scale_is_clipped():
    config = small_config()
    task = ContrastiveTask(config, mesh_of())
    params, _ = task.init(jax.random.key(0))
    np.testing.assert_allclose(jnp.exp(params["log_logit_scale"]), 1 / 0.07, rtol=1e-6)
    high = task.constrain(params | {"log_logit_scale": jnp.float32(9)})
    np.testing.assert_allclose(jnp.exp(high["log_logit_scale"]), 100, rtol=1e-5)


def test_batch_spec_matches_the_batch():
    config = small_config()
    spec = ContrastiveTask(config, mesh_of()).batch_spec()
    batch = small_batch(config)
    assert shapes(spec) == shapes(batch)
    config = with_packing(config, group_size=8, rows=7)
    assert shapes(ContrastiveTask(config, mesh_of()).batch_spec()) == shapes(packed(config, batch))
    with pytest.raises(ConfigError, match=r"packing.rows is chosen .* at most group_size 8"):
        ContrastiveTask(with_packing(config, group_size=8, rows=None), mesh_of()).batch_spec()


def shapes(arrays):
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


def test_flops_of_text_are_those_of_its_rows():
    config = small_config()
    padded, packed = (
        ContrastiveTask(c, mesh_of()).flops() for c in (config, with_packing(config, 8, 6))
    )
    projection = 2 * config.model.text.width * config.model.embed_dim
    text = forward_flops(config.model)[1] - projection
    assert packed == padded - 3 * text // 4


def test_flops_of_what_is_left_out_and_of_what_is_frozen():
    config = small_config()
    image, text = forward_flops(config.model)
    assert ContrastiveTask(config, mesh_of()).flops() == 3 * (image + text)
    locked = dataclasses.replace(config, start=StartConfig(lock=("image",)))
    assert ContrastiveTask(locked, mesh_of()).flops() == image + 3 * text
    half = dataclasses.replace(config.model.image, patch_dropout=0.5)  # 2 of 4 patches
    dropped = dataclasses.replace(config, model=dataclasses.replace(config.model, image=half))
    smaller, _ = forward_flops(dropped.model, training=True)
    assert ContrastiveTask(dropped, mesh_of()).flops() == 3 * (smaller + text)
    # Of the blocks 3 of 5 tokens are left, class token included.
    assert 0.5 < smaller / image < 0.7


def test_flops_are_what_xla_counts():
    """Matrix products only, so XLA's own count may be a little above; layers unrolled to count."""
    config = small_config()
    model = config.model
    wide = dataclasses.replace(
        model,
        image=dataclasses.replace(model.image, width=128),
        text=dataclasses.replace(model.text, width=128),
    )
    config = dataclasses.replace(config, model=wide)
    task = ContrastiveTask(config, mesh_of(), execution=Execution(unroll_layers=True))
    params = jax.eval_shape(task.init, jax.random.key(0))[0]
    lowered = jax.jit(lambda p, b: task.embed(p, {}, b)).lower(params, task.batch_spec())
    counted = lowered.compile().cost_analysis()["flops"]
    analytic = config.global_batch_size * task.flops(least=True) / 3
    assert 1.0 <= counted / analytic < 1.12


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_four_microbatches_of_256_samples_have_the_gradients_of_one(mesh):
    config = small_config(global_batch_size=256, remat="full")
    batch = small_batch(config)
    loss, _, gradients = loss_and_gradients(config, mesh_of(), batch)
    split = dataclasses.replace(config, microbatches=4)
    other, _, split_gradients = loss_and_gradients(split, mesh_of(*mesh), batch)
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradients)))
    difference = jax.tree.map(lambda a, b: np.sum((a - b) ** 2), split_gradients, gradients)
    assert np.sqrt(sum(jax.tree.leaves(difference))) <= 1e-5 * norm


def test_activation_memory_falls_with_the_microbatches():
    config = small_config(global_batch_size=512)

    def temporary_bytes(microbatches):
        task = ContrastiveTask(dataclasses.replace(config, microbatches=microbatches), mesh_of())
        params, _ = jax.eval_shape(task.init, jax.random.key(0))
        gradient = jax.grad(
            lambda p, b: task.loss(p, {}, b, rng=jax.random.key(0), step=jnp.int32(0))[0]
        )
        compiled = jax.jit(gradient).lower(params, task.batch_spec()).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one, eight = temporary_bytes(1), temporary_bytes(8)
    # What does not fall: embeddings and their gradients, and the float images of one batch.
    assert eight < one / 4


def test_on_cpus_microbatches_convolve_outside_of_loops():
    """Inside of one XLA's CPU backend is 20 times slower: it lays convolutions out in no loop."""
    config = small_config(microbatches=2)
    image = dataclasses.replace(
        config.model.image, stem="conv", stem_widths=(8, 8, 8), stem_strides=(2, 2, 2)
    )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, image=image))
    task = ContrastiveTask(config, mesh_of())
    params, _ = jax.eval_shape(task.init, jax.random.key(0))

    def loss(params, batch):
        return task.loss(params, {}, batch, rng=jax.random.key(0), step=jnp.int32(0))[0]

    text = jax.jit(jax.grad(loss)).lower(params, small_batch(config)).compile().as_text()
    convolutions = [line for line in text.splitlines() if " convolution(" in line]
    assert len(convolutions) > 2 * 3
    assert not any("/while/body/" in line for line in convolutions)


def test_a_batch_that_microbatches_do_not_divide_is_told():
    config = small_config(microbatches=3)
    batch = small_batch(config)
    with pytest.raises(ValueError, match="32 is not divisible by 3 microbatches x 2"):
        loss_and_gradients(config, mesh_of(2), batch)
    config = with_packing(small_config(microbatches=2), group_size=16, rows=16)
    with pytest.raises(ValueError, match="32 in groups of 16 is not divisible by 2 micro"):
        loss_and_gradients(config, mesh_of(2), packed(config, batch))


def test_sigmoid_loss_learns_a_bias():
    config = small_config(
        model=small_model(logit_scale_init=10.0, logit_bias_init=-10.0),
        loss=LossConfig(kind="sigmoid"),
    )
    loss, metrics, gradients = loss_and_gradients(config, mesh_of(2, 2, 2), small_batch(config))
    assert metrics["logit_bias"] == -10
    # Nearly all pairs are answered no by the bias alone: the positives pull it up.
    assert gradients["logit_bias"] < 0
    assert 0 < loss < 20


def test_equal_captions_are_no_negatives():
    config = small_config(loss=LossConfig(duplicates="exclude"))
    batch = small_batch(config)
    batch["tokens"][1::2] = batch["tokens"][0]
    weighted = batch | {"weight": np.ones(32, np.float32)}
    excluded = loss_and_gradients(config, mesh_of(4), weighted)[0]
    task = ContrastiveTask(config, mesh_of())
    params, _ = jax.jit(task.init)(jax.random.key(0))

    @jax.jit
    def dense(params, batch, text_ids):
        embedded = task.embed(params, {}, batch)
        scale = config.model.logit_scale_init
        return dense_softmax_contrastive_loss(
            embedded["image"], embedded["text"], scale, text_ids=text_ids
        )[0]

    row = np.arange(32, dtype=np.int32)
    np.testing.assert_allclose(
        excluded, dense(params, batch, np.where(row % 2 == 1, 0, row)), rtol=1e-5
    )
    assert excluded < dense(params, batch, row) - 0.2  # 17 of 32 captions are the same one


def gradients_and_bytes(config):
    """Gradients of all parameters, and the bytes of temporaries of the program that makes them."""
    task, batch = ContrastiveTask(config, mesh_of()), small_batch(config)
    params, _ = jax.jit(task.init)(jax.random.key(0))

    def loss(params, batch):
        return task.loss(params, {}, batch, rng=jax.random.key(0), step=jnp.int32(0))[0]

    compiled = jax.jit(jax.grad(loss)).lower(params, batch).compile()
    return compiled(params, batch), compiled.memory_analysis().temp_size_in_bytes


def test_a_frozen_image_tower_keeps_no_activations():
    """However it is named; it costs what a step without the tower's way back must."""
    deep = dataclasses.replace(small_model().image, depth=6)
    config = small_config(model=dataclasses.replace(small_model(), image=deep))
    trained, all_bytes = gradients_and_bytes(config)
    locked = dataclasses.replace(config, start=StartConfig(model="W", lock=("image",)))
    frozen = dataclasses.replace(config, optimizer=OptimizerConfig(frozen=("image/.*",)))
    found = [gradients_and_bytes(changed) for changed in (locked, frozen)]
    for gradients, num_bytes in found:
        assert not any(leaf.any() for leaf in jax.tree.leaves(gradients["image"]))
        for name in ("text", "image_projection"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                gradients[name],
                trained[name],
            )
        assert num_bytes < all_bytes / 2
    assert found[0][1] == found[1][1]


def test_frozen_paths_are_left_alone_one_by_one():
    frozen = ("text/token_embedding", "image/.*/mlp/.*")
    config = small_config(optimizer=OptimizerConfig(frozen=frozen))
    task = ContrastiveTask(config, mesh_of())
    assert not task.trainable("text/token_embedding")
    assert not task.trainable("image/blocks/mlp/up/kernel")
    assert task.trainable("image/blocks/attention/qkv/kernel")
    gradients, _ = gradients_and_bytes(config)
    assert not gradients["text"]["token_embedding"].any()
    assert not gradients["image"]["blocks"]["mlp"]["up"]["kernel"].any()
    assert gradients["image"]["blocks"]["attention"]["qkv"]["kernel"].any()
    assert gradients["text"]["blocks"]["mlp"]["up"]["kernel"].any()
