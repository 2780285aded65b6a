"""The dense losses against the formulas written a row at a time in another library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives.oracle import random_pairs, relative_error, textbook

from clip_jax.objectives import dense_sigmoid_contrastive_loss, dense_softmax_contrastive_loss

DENSE = {"softmax": dense_softmax_contrastive_loss, "sigmoid": dense_sigmoid_contrastive_loss}
IDS = ("image_ids", "text_ids")
CASES = [
    ("softmax", (), {}),
    ("softmax", (*IDS, "weights"), {"beta": 0.4}),
    ("softmax", (*IDS, "weights"), {"duplicates": "positive", "label_smoothing": 0.1, "beta": 0.4}),
    ("sigmoid", (), {}),
    ("sigmoid", ("text_ids", "weights"), {"beta": 0.4}),
    ("sigmoid", (*IDS, "weights"), {"duplicates": "positive", "beta": 0.4}),
]


@pytest.mark.parametrize(("kind", "use", "options"), CASES)
def test_equals_the_formula_row_by_row(kind, use, options):
    pairs = random_pairs(16, 6)
    loss, gradients = textbook(pairs, 5.0, -2.0, kind=kind, use=use, **options)
    with jax.enable_x64(True):
        labels = {name: jnp.asarray(pairs[name]) for name in use}
        got, got_gradients = jax.value_and_grad(
            lambda *inputs: DENSE[kind](*inputs, **labels, **options)[0], argnums=(0, 1, 2, 3)
        )(jnp.asarray(pairs["image"]), jnp.asarray(pairs["text"]), jnp.array(5.0), jnp.array(-2.0))
    assert abs(float(got) - loss) < 1e-12
    for mine, theirs in zip(got_gradients, gradients, strict=True):
        assert relative_error(np.asarray(mine), theirs) < 1e-11


def test_metrics_of_a_batch_that_can_be_seen_through():
    # Cosines: the first two pairs are right, the third text is nearest to the second image.
    image = jnp.eye(3)
    text = jnp.array([[1.0, 0, 0], [0, 0.8, 0.6], [0, 0.8, 0.6]])
    _, metrics = jax.jit(dense_softmax_contrastive_loss)(image, text, 2.0)
    assert float(metrics["image_to_text_accuracy"]) == pytest.approx(1 / 3)
    assert float(metrics["text_to_image_accuracy"]) == pytest.approx(2 / 3)
    assert float(metrics["positive_similarity"]) == pytest.approx((1 + 0.8 + 0.6) / 3)
    assert float(metrics["negative_similarity"]) == pytest.approx((0.8 + 0.6) / 6)
