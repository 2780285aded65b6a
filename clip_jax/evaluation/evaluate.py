"""Scores of a model on the sets of its config: retrieval both ways, and zero-shot.

Shape suffixes: N pairs of a set, E embedding width.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax.config import EvalSetConfig, ExperimentConfig
from clip_jax.data.pipeline import captions, evaluation_batches
from clip_jax.data.sources import open_source
from clip_jax.data.sources.webdataset import WebdatasetSource
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.retrieval import ranks, recalls
from clip_jax.evaluation.zero_shot import class_embeddings, expected_top1
from clip_jax.parallel import batch_sharding, replicated
from clip_jax.tasks import Task


@dataclasses.dataclass(frozen=True)
class SetResult:
    """What one set gave. metrics: 'text_to_image_R@1', 'text_to_image_R@1/chance', ..."""

    config: EvalSetConfig
    metrics: dict[str, float]
    source: WebdatasetSource
    captions: list[str]
    image_embeddings: np.ndarray  # float32 [N, E], unit length
    text_embeddings: np.ndarray  # float32 [N, E], of the captions as they are
    class_embeddings: np.ndarray | None  # float32 [N, E], of the captions in the prompts


class Evaluator:
    """Scores every set of `config.evaluation`, on all devices of all processes.

    Opens the sets when it is made, so that a missing one stops a run before it trains. Raises
    UserError for that. Each tower compiles once for all sets and calls.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        config: ExperimentConfig,
        mesh: Mesh,
        cache_dir: Path,
    ) -> None:
        self._tokenizer, self._config, self._mesh = tokenizer, config, mesh
        self._sources = {
            name: open_source(eval_set, cache_dir)
            for name, eval_set in config.evaluation.sets.items()
        }
        # Replicated results: every process reads all rows without a further collective.
        self._embed = jax.jit(
            task.embed,
            in_shardings=(None, None, batch_sharding(mesh)),
            out_shardings=replicated(mesh),
        )

    def __call__(self, params: Any, model_state: Any) -> dict[str, SetResult]:
        """Results by set, in the order of the config."""
        embedder = Embedder(functools.partial(self._embed, params, model_state), self._mesh)
        return {
            name: self._evaluate_set(embedder, eval_set, self._sources[name])
            for name, eval_set in self._config.evaluation.sets.items()
        }

    def _evaluate_set(
        self, embedder: Embedder, eval_set: EvalSetConfig, source: WebdatasetSource
    ) -> SetResult:
        config, tokenizer = self._config, self._tokenizer
        model, batch_size = config.model, config.evaluation.batch_size
        texts = captions(source)
        image_batches = evaluation_batches(
            source,
            None,
            image_size=model.image.image_size,
            context_length=model.text.context_length,
            batch_size=batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=config.data.num_threads,
            framing=config.data.framing,
        )
        image_NE = embedder.embed(image_batches, name="image", num_samples=len(texts))
        context_length = model.text.context_length
        text_NE = embedder.embed_tokens(tokenizer(texts, context_length), batch_size=batch_size)

        own = np.arange(len(texts))
        metrics: dict[str, float] = {"num_pairs": float(len(texts))}
        for direction, query_NE, key_NE in (
            ("text_to_image", text_NE, image_NE),
            ("image_to_text", image_NE, text_NE),
        ):
            scores = recalls(ranks(query_NE, key_NE, own), len(texts))
            metrics |= {f"{direction}_{name}": value for name, value in scores.items()}
        class_NE = None
        if eval_set.zero_shot_ways:
            class_NE = class_embeddings(
                embedder,
                tokenizer,
                texts,
                eval_set.templates,
                context_length=context_length,
                batch_size=batch_size,
            )
            ways = min(eval_set.zero_shot_ways, len(texts))
            name = f"zero_shot_{eval_set.zero_shot_ways}way_top1"
            metrics[name] = expected_top1(ranks(image_NE, class_NE, own), len(texts), ways)
            metrics[f"{name}/chance"] = 1 / ways
        return SetResult(eval_set, metrics, source, texts, image_NE, text_NE, class_NE)


def metrics_line(results: dict[str, SetResult]) -> dict[str, float]:
    """All scores as `eval/<set>/<metric>`, the keys of an evaluation line of metrics.jsonl."""
    return {
        f"eval/{name}/{metric}": value
        for name, result in results.items()
        for metric, value in result.metrics.items()
    }
