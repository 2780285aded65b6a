"""Zero-shot classification with ensembled prompts (Radford et al. 2021, section 3.1.4).

Shape suffixes: N images, C classes, P prompts, E embedding width.
"""

from collections.abc import Callable, Sequence

import numpy as np


def class_embeddings(
    embed_texts: Callable[[list[str]], np.ndarray],
    names: Sequence[str],
    templates: Sequence[str],
) -> np.ndarray:
    """Unit-length float32 [C, E]: the mean over the prompts of each class's text embeddings.

    embed_texts: texts to unit-length float32 [len(texts), E].
    """
    prompts = [template.replace("{}", name) for name in names for template in templates]
    embeddings_CPE = embed_texts(prompts).reshape(len(names), len(templates), -1)
    mean_CE = embeddings_CPE.mean(axis=1)
    return mean_CE / np.maximum(np.linalg.norm(mean_CE, axis=1, keepdims=True), 1e-12)


def expected_top1(ranks_N: np.ndarray, num_classes: int, ways: int) -> float:
    """Top-1 accuracy among `ways` candidates: the right class and ways - 1 others at random.

    ranks_N: for each image, how many of the other classes score at least as high as the right one.
    It is the exact expectation over all draws of the others, C(n - r, w) / C(n, w) for n others,
    w of them drawn, of which r would win: no sampling noise, however small the set.
    """
    others, drawn = num_classes - 1, min(ways, num_classes) - 1
    # The factors (n - r - i) / (n - i) of the ratio of binomials, i = 0 .. w - 1.
    i_W = np.arange(drawn)
    factors_NW = np.maximum(others - ranks_N[:, None] - i_W, 0) / (others - i_W)
    return float(factors_NW.prod(axis=1).mean())
