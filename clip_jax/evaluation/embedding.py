"""Embeddings of whole sets, computed by all devices, each sample exactly once.

Shape suffixes: B global batch, E embedding width, N samples, L tokens.
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from clip_jax.parallel import to_global_batch


class Embedder:
    """A task's towers with fixed weights, run over batches.

    embed_batch: `Task.embed` with its weights bound, jitted with replicated results.
    """

    def __init__(
        self, embed_batch: Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]], mesh: Mesh
    ) -> None:
        self._embed_batch, self._mesh = embed_batch, mesh

    def embed(
        self, batches: Iterable[Mapping[str, np.ndarray]], *, name: str, num_samples: int
    ) -> np.ndarray:
        """float32 [N, E] of the tower `name` ('image' or 'text'), in the order of `index`.

        batches: this process's rows as `evaluation_batches` yields them: the tower's inputs, `mask`
        bool [b] (False: padding, dropped here) and `index` int [b] (place among the N).
        """
        result: np.ndarray | None = None
        seen = np.zeros(num_samples, bool)
        for batch in batches:
            inputs = {k: v for k, v in batch.items() if k not in ("mask", "index")}
            place = {k: np.asarray(batch[k]) for k in ("mask", "index")}
            rows = self._embed_batch(to_global_batch(inputs, self._mesh))[name]
            embeddings_BE = np.asarray(rows)
            if jax.process_count() > 1:
                place = multihost_utils.process_allgather(place, tiled=True)
            mask_B, index_B = place["mask"], place["index"]
            if result is None:
                result = np.zeros((num_samples, embeddings_BE.shape[1]), np.float32)
            result[index_B[mask_B]] = embeddings_BE[mask_B]
            seen[index_B[mask_B]] = True
        assert result is not None, "no batches"
        assert seen.all(), f"{int((~seen).sum())} of {num_samples} samples were not embedded"
        return result

    def embed_tokens(self, tokens_NL: np.ndarray, *, batch_size: int) -> np.ndarray:
        """float32 [N, E] of tokens that every process holds whole. batch_size: global."""
        num_samples = len(tokens_NL)
        num_local = batch_size // jax.process_count()
        first = jax.process_index() * num_local

        def batches() -> Iterable[dict[str, np.ndarray]]:
            for start in range(0, num_samples, batch_size):
                index = start + first + np.arange(num_local)
                mask = index < num_samples
                index = np.where(mask, index, 0)
                yield {"tokens": tokens_NL[index], "mask": mask, "index": index}

        return self.embed(batches(), name="text", num_samples=num_samples)
