"""Embeddings of whole sets, computed by all devices, each sample exactly once.

Shape suffixes: B global batch, E embedding width, N samples, L tokens.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax.parallel import batch_sharding, replicated, to_global_batch
from clip_jax.tasks import Task

_PLACES = ("mask", "index")


class Embedder:
    """Runs a task's towers over batches. Each compiles once for each shape of batch."""

    def __init__(self, task: Task, mesh: Mesh) -> None:
        self._mesh = mesh

        def embed(params: Any, model_state: Any, batch: Mapping[str, jax.Array]) -> Any:
            # Places travel with their rows: the mesh may order devices unlike processes.
            places = {name: batch[name] for name in _PLACES}
            return task.embed(params, model_state, batch) | places

        # Replicated results: every process reads all rows without a further collective.
        self._embed = jax.jit(
            embed,
            in_shardings=(None, None, batch_sharding(mesh)),
            out_shardings=replicated(mesh),
        )

    def embed(
        self,
        params: Any,
        model_state: Any,
        batches: Iterable[Mapping[str, np.ndarray]],
        *,
        name: str,
        num_samples: int,
    ) -> np.ndarray:
        """float32 [N, E] of the tower `name` ('image' or 'text'), in the order of `index`.

        batches: this process's rows as `evaluation_batches` yields them: the tower's inputs, `mask`
        bool [b] (False: padding, dropped here) and `index` int [b] (place among the N).
        """
        result: np.ndarray | None = None
        seen = np.zeros(num_samples, bool)
        for batch in batches:
            rows = self._embed(params, model_state, to_global_batch(dict(batch), self._mesh))
            rows = jax.device_get(rows)
            mask_B, embeddings_BE = rows["mask"], rows[name]
            index_b = rows["index"][mask_B]
            if result is None:
                result = np.zeros((num_samples, embeddings_BE.shape[1]), np.float32)
            result[index_b] = embeddings_BE[mask_B]
            seen[index_b] = True
        assert result is not None, "no batches"
        assert seen.all(), f"{int((~seen).sum())} of {num_samples} samples were not embedded"
        return result

    def embed_tokens(
        self, params: Any, model_state: Any, tokens_NL: np.ndarray, *, batch_size: int
    ) -> np.ndarray:
        """float32 [N, E] of tokens that every process holds whole. batch_size: global."""
        num_samples = len(tokens_NL)
        num_local = batch_size // jax.process_count()
        first = jax.process_index() * num_local

        def batches() -> Iterable[dict[str, np.ndarray]]:
            for start in range(0, num_samples, batch_size):
                index = (start + first + np.arange(num_local)).astype(np.int32)
                mask = index < num_samples
                index = np.where(mask, index, 0)
                yield {"tokens": tokens_NL[index], "mask": mask, "index": index}

        return self.embed(params, model_state, batches(), name="text", num_samples=num_samples)
