import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from small import small_model

from clip_jax.models import Execution
from clip_jax.models.pooling import AttentionPooling

LENGTHS = np.array([5, 1, 7])


def test_pooling_with_lengths_is_that_of_the_shortened_rows():
    pooling = AttentionPooling(small_model().image, Execution(), rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((3, 7, 32)).astype(np.float32)
    found = pooling(x, jnp.asarray(LENGTHS))
    assert found.shape == (3, 32)
    for row, length in enumerate(LENGTHS):
        expected = pooling(x[row : row + 1, :length])
        np.testing.assert_allclose(found[row : row + 1], expected, atol=1e-5)


def test_order_of_tokens_does_not_count():
    pooling = AttentionPooling(small_model().image, Execution(), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 7, 32))
    np.testing.assert_allclose(pooling(x[:, ::-1]), pooling(x), atol=1e-5)
