"""Retrieval scores from embeddings, in blocks: never an array of all pairs.

Shape suffixes: Q queries, K keys, E embedding width, b queries of one block.
"""

from collections.abc import Iterator, Sequence

import numpy as np

_BLOCK_BYTES = 64 << 20  # of one [b, K] float32 block of similarities

RECALLS_AT = (1, 5, 10)


def similarity_blocks(query_QE: np.ndarray, key_KE: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first query, similarities [b, K]) over all queries."""
    block = max(1, _BLOCK_BYTES // (4 * len(key_KE)))
    for start in range(0, len(query_QE), block):
        yield start, query_QE[start : start + block] @ key_KE.T


def ranks(query_QE: np.ndarray, key_KE: np.ndarray, positive_Q: np.ndarray) -> np.ndarray:
    """How many wrong keys score at least as high as query q's right one, `positive_Q[q]`: int [Q].

    Ties and comparisons with NaN count against the query, so collapsed embeddings score nothing.
    """
    result_Q = np.empty(len(query_QE), np.int64)
    for start, similarity_bK in similarity_blocks(query_QE, key_KE):
        rows_b = np.arange(len(similarity_bK))
        right_b = similarity_bK[rows_b, positive_Q[start : start + len(rows_b)]]
        worse_bK = similarity_bK < right_b[:, None]
        result_Q[start : start + len(rows_b)] = len(key_KE) - 1 - worse_bK.sum(axis=1)
    return result_Q


def recalls(ranks_Q: np.ndarray, num_keys: int, at: Sequence[int] = RECALLS_AT) -> dict[str, float]:
    """`R@k` for each k: the share of queries whose right key is among the k best; and chance."""
    scores = {}
    for k in at:
        scores[f"R@{k}"] = float((ranks_Q < k).mean())
        scores[f"R@{k}/chance"] = min(k / num_keys, 1.0)
    return scores
