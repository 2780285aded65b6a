"""What the report of a run shows, gathered from its workdir and its last evaluation."""

import os
import platform
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import clip_jax
from clip_jax.checkpoint import AnyPath, Workdir, read_metrics
from clip_jax.config import ExperimentConfig, to_dict
from clip_jax.data.quickstart import ATTRIBUTION
from clip_jax.data.transforms import decode_image, evaluation_image
from clip_jax.evaluation.evaluate import SetResult
from clip_jax.evaluation.report import Confusion, Gallery, Report, Score, Similarity, write_report

_MAX_PICTURES = 2000  # of the gallery: about 2 MB of page
_THUMBNAIL = 56  # pixels
_NUM_FEATURED = 24
_NUM_CONFUSIONS = 24
_NUM_IN_MATRIX = 24


def write_run_report(
    workdir: Workdir,
    config: ExperimentConfig,
    results: Mapping[str, SetResult],
    *,
    step: int,
    num_parameters: int,
) -> AnyPath:
    """Writes the report of a run at `step`, from metrics.jsonl and the results of its evaluation.

    That of the last step is `report.html`, another `report-step-N.html`. Returns its path. The
    first set of the config is the one that can be searched.
    """
    metrics = [line for line in read_metrics(workdir.metrics) if line["step"] <= step]
    gallery = confusions = similarity = None
    if results:
        name, result = next(iter(results.items()))
        gallery, confusions, similarity = _pictures(name, result, config)
    report = Report(
        title=f"{config.name}: a CLIP, trained and tested",
        summary=_summary(config, results, step),
        run=_facts(config, metrics, step, num_parameters),
        metrics=metrics,
        scores=_scores(results),
        gallery=gallery,
        confusions=confusions or [],
        similarity=similarity,
        config=to_dict(config),
        environment=_environment(),
        attribution=_attribution(config),
    )
    last = step == config.num_steps
    path = workdir.report if last else workdir.path / f"report-step-{step}.html"
    write_report(path, report)
    return path


def _pictures(
    name: str, result: SetResult, config: ExperimentConfig
) -> tuple[Gallery, list[Confusion], Similarity]:
    num = len(result.captions)
    chosen = np.linspace(0, num - 1, min(num, _MAX_PICTURES)).round().astype(int)
    image_NE, text_NE = result.image_embeddings[chosen], result.text_embeddings[chosen]
    captions = [result.captions[i] for i in chosen]
    pictures = [decode_image(result.source[int(i)].image) for i in chosen]
    similarity_NN = image_NE @ text_NE.T
    # Ties count against the right picture, as they do in the scores.
    np.fill_diagonal(similarity_NN, np.nextafter(similarity_NN.diagonal(), -2, dtype=np.float32))
    top_images = np.argsort(-similarity_NN.T, axis=1, kind="stable")[:, :8]
    top_scores = np.take_along_axis(similarity_NN.T, top_images, axis=1)
    rng = np.random.default_rng(config.seed)
    # Hits and misses as they fall: a gallery of hits alone would flatter.
    featured = rng.permutation(len(chosen))[:_NUM_FEATURED]
    hit = top_images[featured, 0] == featured
    featured = np.roll(featured, -int(hit.argmax()))  # but the first one shown is a hit
    gallery = Gallery(
        name=name.replace("_", " "),
        description=result.config.description
        + (f" Every {num / len(chosen):.1f}th of {num:,} pairs." if len(chosen) < num else ""),
        images=np.stack([evaluation_image(p, _THUMBNAIL, config.data.framing) for p in pictures]),
        captions=captions,
        top_images=top_images,
        top_scores=top_scores,
        featured=[int(i) for i in featured],
    )
    return (
        gallery,
        _confusions(similarity_NN, captions),
        _similarity(similarity_NN, captions, rng),
    )


def _confusions(similarity_NN: np.ndarray, captions: list[str]) -> list[Confusion]:
    """The wrong captions that won by most."""
    predicted_N = similarity_NN.argmax(axis=1)
    rows_N = np.arange(len(captions))
    margin_N = similarity_NN[rows_N, predicted_N] - similarity_NN[rows_N, rows_N]
    worst = [int(i) for i in np.argsort(-margin_N, kind="stable") if predicted_N[i] != i]
    return [
        Confusion(
            image=i,
            true_caption=captions[i],
            predicted_caption=captions[predicted_N[i]],
            true_score=float(similarity_NN[i, i]),
            predicted_score=float(similarity_NN[i, predicted_N[i]]),
            predicted_image=int(predicted_N[i]),
        )
        for i in worst[:_NUM_CONFUSIONS]
    ]


def _similarity(
    similarity_NN: np.ndarray, captions: list[str], rng: np.random.Generator
) -> Similarity:
    some = np.sort(rng.permutation(len(captions))[:_NUM_IN_MATRIX])
    return Similarity(
        images=[int(i) for i in some],
        captions=[captions[i] for i in some],
        matrix=similarity_NN[np.ix_(some, some)],
    )


def _scores(results: Mapping[str, SetResult]) -> list[Score]:
    return [
        Score(set=name, metric=metric, value=value, chance=result.metrics[f"{metric}/chance"])
        for name, result in results.items()
        for metric, value in result.metrics.items()
        if f"{metric}/chance" in result.metrics
    ]


def _summary(config: ExperimentConfig, results: Mapping[str, SetResult], step: int) -> str:
    samples = step * config.global_batch_size
    sentence = (
        f"Trained from scratch for {step:,} steps of {config.global_batch_size} "
        f"image-text pairs ({samples:,} in all)"
    )
    if results:
        name, result = next(iter(results.items()))
        recall = result.metrics["text_to_image_R@1"]
        sentence += (
            f". Given a text, it finds the one right picture among {len(result.captions):,} "
            f"({name.replace('_', ' ')}) in {recall:.1%} of cases"
        )
    return sentence + "."


def _facts(
    config: ExperimentConfig, metrics: list[dict[str, Any]], step: int, num_parameters: int
) -> dict[str, str | int | float]:
    facts: dict[str, str | int | float] = {
        "steps": step,
        "global batch size": config.global_batch_size,
        "samples seen": step * config.global_batch_size,
        "parameters": num_parameters,
    }
    lines = [line for line in metrics if "loss" in line]
    if lines:
        facts["training seconds, compilation included"] = round(lines[-1]["train_seconds"])
        rates = sorted(line["samples_per_second"] for line in lines)
        facts["samples per second, median"] = round(rates[len(rates) // 2])
        facts["final loss"] = round(lines[-1]["loss"], 4) if lines[-1]["loss"] else "not finite"
    return facts


def _environment() -> dict[str, str]:
    devices = jax.devices()
    return {
        "clip_jax": clip_jax.__version__,
        "jax": jax.__version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": str(jax.process_count()),
        "CPU cores": str(os.cpu_count()),
    }


def _attribution(config: ExperimentConfig) -> list[str]:
    kinds = [source.kind for source in config.data.sources.values()]
    kinds += [eval_set.kind for eval_set in config.evaluation.sets.values()]
    return list(ATTRIBUTION) if "quickstart" in kinds else []
