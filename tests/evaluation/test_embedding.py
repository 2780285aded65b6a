import functools

import jax
import numpy as np
import pytest
from small import mesh_of, small_batch, small_config

from clip_jax.evaluation.embedding import Embedder
from clip_jax.parallel import batch_sharding, replicated
from clip_jax.tasks import ContrastiveTask

NUM = 21  # not a multiple of the batch


@pytest.fixture(scope="module")
def embedded():
    """The embedder on four of eight devices' rows, and the embeddings it should give."""
    config = small_config()
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    task = ContrastiveTask(config, mesh)
    params, model_state = task.init(jax.random.key(0))
    samples = small_batch(config, num=NUM)
    expected = jax.device_get(task.embed(params, model_state, samples))
    embed = jax.jit(
        task.embed,
        in_shardings=(None, None, batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )
    return Embedder(functools.partial(embed, params, model_state), mesh), samples, expected


def test_every_image_once_whatever_the_order_of_batches(embedded):
    embedder, samples, expected = embedded
    rows = np.concatenate([np.arange(NUM), np.full(3, -1)]).reshape(3, 8)[[2, 0, 1]]
    batches = (
        {"image": samples["image"][index], "mask": index >= 0, "index": index} for index in rows
    )
    result = embedder.embed(batches, name="image", num_samples=NUM)
    np.testing.assert_allclose(result, expected["image"], atol=1e-5)


def test_texts_with_a_ragged_tail(embedded):
    embedder, samples, expected = embedded
    result = embedder.embed_tokens(samples["tokens"], batch_size=8)
    assert result.shape == (NUM, 16)
    np.testing.assert_allclose(result, expected["text"], atol=1e-5)


def test_a_sample_left_out_is_noticed(embedded):
    embedder, samples, _ = embedded
    index = np.arange(8)
    batch = {"image": samples["image"][index], "mask": index < 7, "index": index}
    with pytest.raises(AssertionError, match="14 of 21 samples were not embedded"):
        embedder.embed([batch], name="image", num_samples=NUM)
