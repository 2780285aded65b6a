import numpy as np
import pytest

from clip_jax.evaluation import retrieval
from clip_jax.evaluation.retrieval import ranks, recalls


def unit(rng, *shape):
    x = rng.standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_ranks_equal_a_full_sort(monkeypatch, block_bytes):
    monkeypatch.setattr(retrieval, "_BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(0)
    query, key, positive = unit(rng, 50, 8), unit(rng, 70, 8), rng.integers(0, 70, 50)
    order = np.argsort(-(query @ key.T), axis=1)
    expected = [int(np.flatnonzero(order[q] == positive[q])[0]) for q in range(50)]
    assert ranks(query, key, positive).tolist() == expected


def test_recalls_and_chance():
    scores = recalls(np.array([0, 0, 4, 9, 99]), num_keys=8, at=(1, 5, 10))
    assert scores == {
        "R@1": 0.4,
        "R@1/chance": 1 / 8,
        "R@5": 0.6,
        "R@5/chance": 5 / 8,
        "R@10": 0.8,
        "R@10/chance": 1.0,
    }


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_collapsed_embeddings_score_nothing(value):
    same = np.full((20, 4), value, np.float32)
    assert (ranks(same, same, np.arange(20)) == 19).all()
