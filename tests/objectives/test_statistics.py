"""Statistics come out the same in whatever pieces and order the columns are seen."""

import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.objectives.statistics import merge, nothing, summarize
from clip_jax.objectives.terms import Labels, Terms, part


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_pieces_in_any_order_make_the_whole(kind, beta):
    terms = Terms(kind=kind, beta=beta)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)) * 100, jnp.float32)

    def of(columns: slice):
        tile = part(terms, logits[:, columns], jnp.float32(0), Labels(), Labels(), None)
        return summarize(terms, tile, is_column=False)

    whole = of(slice(None)).negatives
    pieces = nothing(terms, 4, is_column=False)
    for columns in (slice(6, 9), slice(0, 1), slice(1, 6)):
        pieces = merge(terms, of(columns), pieces)
    for got, expected in zip(pieces.negatives, whole, strict=True):
        if expected is not None:
            np.testing.assert_allclose(got, expected, rtol=2e-6)
