import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from small import mesh_of, small_batch, small_config

from clip_jax.evaluation.embedding import Embedder
from clip_jax.parallel import MESH_AXES
from clip_jax.tasks import ContrastiveTask

NUM = 21  # not a multiple of the batch


@pytest.fixture(scope="module")
def embedded():
    """The embedder on eight devices, its weights, and the embeddings it should give."""
    config = small_config()
    # Devices in an order of the mesh's own, as on a torus.
    order = np.array(jax.devices()).reshape(2, 2, 2).transpose(1, 0, 2)
    mesh = Mesh(order, MESH_AXES)
    task = ContrastiveTask(config, mesh)
    weights = task.init(jax.random.key(0))
    samples = small_batch(config, num=NUM)
    alone = ContrastiveTask(config, mesh_of())  # any number of rows
    expected = jax.device_get(jax.jit(alone.embed)(*weights, samples))
    return Embedder(task, mesh), weights, samples, expected


def test_every_image_once_whatever_the_order_of_batches(embedded):
    embedder, weights, samples, expected = embedded
    rows = np.concatenate([np.arange(NUM), np.full(3, -1)]).reshape(3, 8)[[2, 0, 1]]
    batches = (
        {"image": samples["image"][index], "mask": index >= 0, "index": index} for index in rows
    )
    result = embedder.embed(*weights, batches, name="image", num_samples=NUM)
    np.testing.assert_allclose(result, expected["image"], atol=1e-5)


def test_texts_with_a_ragged_tail(embedded):
    embedder, weights, samples, expected = embedded
    result = embedder.embed_tokens(*weights, samples["tokens"], batch_size=8)
    assert result.shape == (NUM, 16)
    np.testing.assert_allclose(result, expected["text"], atol=1e-5)


def test_a_sample_left_out_is_noticed(embedded):
    embedder, weights, samples, _ = embedded
    index = np.arange(8)
    batch = {"image": samples["image"][index], "mask": index < 7, "index": index}
    with pytest.raises(AssertionError, match="14 of 21 samples were not embedded"):
        embedder.embed(*weights, [batch], name="image", num_samples=NUM)
