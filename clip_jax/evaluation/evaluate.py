"""Scores of a model on the sets of its config: retrieval both ways, and zero-shot.

Shape suffixes: N pairs of a set, E embedding width.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax.config import EvalSetConfig, ExperimentConfig
from clip_jax.data.pipeline import evaluation_batches
from clip_jax.data.record import Source
from clip_jax.data.source_captions import captions
from clip_jax.data.sources import open_source
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.retrieval import RECALLS_AT, ranks, recalls
from clip_jax.evaluation.zero_shot import class_embeddings, expected_top1
from clip_jax.tasks import Task


@dataclasses.dataclass(frozen=True)
class SetResult:
    """What one set gave. metrics: 'text_to_image_R@1', 'text_to_image_R@1/chance', ..."""

    config: EvalSetConfig
    metrics: dict[str, float]
    source: Source
    captions: list[str]
    image_embeddings: np.ndarray  # float32 [N, E], unit length
    text_embeddings: np.ndarray  # float32 [N, E], of the captions as they are


class Evaluator:
    """Scores every set of `config.evaluation`, on all devices of all processes.

    Opens the sets when it is made, so that a missing one stops a run before it trains. Raises
    UserError for that. Each tower compiles once for all sets and calls. A set smaller than its
    `zero_shot_ways` is scored, and its metric named, with as many ways as it has pairs.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        config: ExperimentConfig,
        mesh: Mesh,
        cache_dir: Path,
    ) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._embedder = Embedder(task, mesh)
        self._sources = {
            # A part of a set would be scored as if it were the whole.
            name: open_source(eval_set, cache_dir, on_bad_sample="fail")
            for name, eval_set in config.evaluation.sets.items()
        }
        # Read now: a set that is bad would end a run when it has trained.
        self._captions = {name: captions(source, name) for name, source in self._sources.items()}

    def __call__(self, params: Any, model_state: Any) -> dict[str, SetResult]:
        """Results by set, in the order of the config."""
        return {name: self._evaluate_set(name, params, model_state) for name in self._sources}

    def metric_names(self) -> list[str]:
        """Of the scores that `metrics_line` will have, chances left out."""
        names = []
        for name, texts in self._captions.items():
            for direction in ("text_to_image", "image_to_text"):
                names += [f"eval/{name}/{direction}_R@{k}" for k in RECALLS_AT]
            if wanted := self._config.evaluation.sets[name].zero_shot_ways:
                names.append(f"eval/{name}/zero_shot_{min(wanted, len(texts))}way_top1")
        return names

    def _evaluate_set(self, name: str, params: Any, model_state: Any) -> SetResult:
        config, source = self._config, self._sources[name]
        eval_set, model = config.evaluation.sets[name], config.model
        texts = self._captions[name]

        def embed_texts(texts: list[str]) -> np.ndarray:
            tokens = self._tokenizer(texts, model.text.context_length)
            return self._embedder.embed_tokens(
                params, model_state, tokens, batch_size=config.evaluation.batch_size
            )

        image_batches = evaluation_batches(
            source,
            None,
            image=model.image,
            context_length=model.text.context_length,
            batch_size=config.evaluation.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=config.data.num_threads,
            framing=config.data.framing,
        )
        with image_batches:
            image_NE = self._embedder.embed(
                params, model_state, image_batches, name="image", num_samples=len(texts)
            )
        text_NE = embed_texts(texts)

        own = np.arange(len(texts))
        metrics: dict[str, float] = {"num_pairs": float(len(texts))}
        for direction, query_NE, key_NE in (
            ("text_to_image", text_NE, image_NE),
            ("image_to_text", image_NE, text_NE),
        ):
            scores = recalls(ranks(query_NE, key_NE, own), len(texts))
            metrics |= {f"{direction}_{metric}": value for metric, value in scores.items()}
        if eval_set.zero_shot_ways:
            class_NE = class_embeddings(embed_texts, texts, eval_set.templates)
            ways = min(eval_set.zero_shot_ways, len(texts))
            metric = f"zero_shot_{ways}way_top1"
            metrics[metric] = expected_top1(ranks(image_NE, class_NE, own), len(texts), ways)
            metrics[f"{metric}/chance"] = 1 / ways
        return SetResult(eval_set, metrics, source, texts, image_NE, text_NE)


def metrics_line(results: dict[str, SetResult]) -> dict[str, float]:
    """All scores as `eval/<set>/<metric>`, the keys of an evaluation line of metrics.jsonl."""
    return {
        f"eval/{name}/{metric}": value
        for name, result in results.items()
        for metric, value in result.metrics.items()
    }
