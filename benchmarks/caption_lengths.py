"""Lengths of web captions in tokens, drawn: no package carries the captions themselves.

DataComp-1B's raw captions have 10.22 words on average (Li et al. 2024, "What if we recaption
billions of web images with LLaMA-3?", section 4), CC12M's 20.2 with a standard deviation of 16.3
(Changpinyo et al. 2021, table 1). Words are log-normal, with CC12M's ratio of deviation to mean for
both, 1.4 tokens of CLIP's BPE to a word (assumed); start and end of text are added.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

LENGTH = 77
TOKENS_PER_WORD = 1.4
WEB_WORDS = {"DataComp-1B": 10.22, "CC12M": 20.2}
WEB_VARIATION = 16.3 / 20.2  # deviation / mean

Draw = Callable[[int, int], NDArray[np.int32]]  # (how many, seed) to lengths


def web_lengths(words: float) -> Draw:
    """Lengths of captions with so many words on average, cut at 77 tokens."""

    def draw(num: int, seed: int) -> NDArray[np.int32]:
        variance = np.log1p(WEB_VARIATION**2)
        mean = np.log(TOKENS_PER_WORD * words) - variance / 2
        tokens = np.random.default_rng(seed).lognormal(mean, variance**0.5, num)
        return np.clip(2 + np.round(tokens), 3, LENGTH).astype(np.int32)

    return draw
