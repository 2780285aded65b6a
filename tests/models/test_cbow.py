import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clip_jax.config import TextTowerConfig
from clip_jax.models import Execution
from clip_jax.models.cbow import BagOfWords

CONFIG = TextTowerConfig(
    kind="cbow", vocab_size=16, eot_id=15, context_length=6, width=8, pooling="mean"
)


def tower(dtype=jnp.float32):
    return BagOfWords(CONFIG, Execution(dtype=dtype), rngs=nnx.Rngs(0))


def test_mean_of_the_real_tokens():
    """In any order, whatever follows the end of text; token 0 is padding only after it."""
    model = tower()
    pooled, features = model(np.array([[3, 0, 3, 15, 0, 9], [3, 3, 0, 15, 15, 15]], np.int32))
    table = np.asarray(model.token_embedding[...])
    np.testing.assert_allclose(pooled[0], (2 * table[3] + table[0] + table[15]) / 4, rtol=1e-5)
    np.testing.assert_allclose(pooled[1], pooled[0], rtol=1e-5)
    np.testing.assert_array_equal(features[0], table[[3, 0, 3, 15, 0, 9]])


def test_a_row_without_real_tokens_is_zero_with_a_finite_gradient():
    tokens = np.array([[0, 0, 0], [3, 4, 0]], np.int32)
    pooled, _ = tower()(tokens)
    np.testing.assert_array_equal(pooled[0], 0)
    assert np.abs(pooled[1]).min() > 0
    gradient = jax.grad(lambda m: (m(tokens)[0] ** 2).sum())(tower()).token_embedding[...]
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[3]).min() > 0
    np.testing.assert_array_equal(gradient[0], 0)


def test_bfloat16_rounds_the_token_features_alone():
    tokens = np.array([[3, 4, 15]], np.int32)
    (exact, _), (pooled, features) = tower()(tokens), tower(jnp.bfloat16)(tokens)
    assert (pooled.dtype, features.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(pooled, exact)
