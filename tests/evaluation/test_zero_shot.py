import itertools

import numpy as np
import pytest

from clip_jax.evaluation.zero_shot import class_embeddings, expected_top1


@pytest.mark.parametrize("ways", [1, 2, 4, 7])
def test_expected_top1_is_the_mean_over_all_draws(ways):
    """Seven classes: every subset of `ways - 1` of the six others, counted out."""
    ranks = np.array([0, 1, 3, 6])
    wins = []
    for rank in ranks:
        draws = list(itertools.combinations(range(6), ways - 1))
        wins.append(np.mean([all(other >= rank for other in draw) for draw in draws]))
    assert expected_top1(ranks, num_classes=7, ways=ways) == pytest.approx(np.mean(wins))


def test_more_ways_than_classes_is_plain_top1():
    assert expected_top1(np.array([0, 0, 1, 5]), num_classes=6, ways=100) == 0.5


def test_chance_is_one_in_ways():
    """Ranks spread evenly, as guessing gives."""
    assert expected_top1(np.arange(500), num_classes=500, ways=100) == pytest.approx(0.01)


def test_class_embeddings_are_the_unit_mean_over_prompts():
    def embed_texts(texts):
        angles = np.array([{"a cat": 0.0, "cat": 0.4, "a dog": 2.0, "dog": 1.0}[t] for t in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    result = class_embeddings(embed_texts, ["cat", "dog"], ["a {}", "{}"])
    angles = np.array([0.2, 1.5])
    np.testing.assert_allclose(result, np.stack([np.cos(angles), np.sin(angles)], 1), atol=1e-6)
