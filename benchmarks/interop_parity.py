"""Embeddings of open_clip's and transformers' models here and there, and a training run in both.

    python benchmarks/interop_parity.py        # about two minutes on two cores

The models are those of tests/interop and tests/parity: random weights with every parameter off its
start, full width, one to two layers where memory or time asks for it. Each is written by the peer,
read here, and run on the same pixels and tokens by both, in float32; the figure is the largest
absolute difference of unit-length embeddings. Takes the extra `verify`.
"""

import contextlib
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import jax
import numpy as np
import pytest
from environment import environment
from interop import hf_models, open_clip_models, test_huggingface, test_open_clip
from parity import test_training
from peers import open_clip_or_skip

from clip_jax.interop import huggingface
from clip_jax.interop import open_clip as open_clip_format
from clip_jax.interop.embeddings import embed

RESULTS = Path(__file__).parent / "results" / "interop_parity.json"


def largest(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    return {part: float(np.abs(ours[part] - theirs[part]).max()) for part in ("image", "text")}


def against_open_clip(open_clip: Any, name: str) -> dict[str, float]:
    cfg = test_open_clip.model_cfg(open_clip, name, **test_open_clip.CASES[name])
    siglip = "timm_model_name" in cfg["vision_cfg"]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        shallow = open_clip_models.shallow_trunks(patch, 2) if siglip else contextlib.nullcontext()
        with shallow:
            model = open_clip_models.build(open_clip, cfg)
            preprocess = test_open_clip.SIGLIP if siglip else None
            directory = open_clip_models.save(model, cfg, Path(folder), preprocess=preprocess)
            inputs = open_clip_models.random_inputs(cfg)
            theirs = open_clip_models.embeddings(model, inputs)
            return largest(embed(open_clip_format.read(directory), inputs), theirs)


def against_transformers(name: str) -> dict[str, float]:
    model = hf_models.random_model(test_huggingface.CASES[name]())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = huggingface.read(Path(folder))
    rng = np.random.default_rng(0)
    images, their_images = test_huggingface.image_inputs(weights.model, rng)
    tokens, their_tokens = test_huggingface.text_inputs(weights.model, rng)
    theirs = {
        "image": hf_models.features(model, **their_images),
        "text": hf_models.features(model, **their_tokens),
    }
    return largest(embed(weights, images | tokens), theirs)


def training(open_clip: Any) -> dict[str, float]:
    """20 steps of AdamW from the same weights on the same batches, here and in open_clip."""
    with tempfile.TemporaryDirectory() as folder:
        here, there, _ = test_training.both_runs(open_clip, Path(folder))
    losses, their_losses = np.array(here[0]), np.array(there[0])
    row = {
        "steps": len(losses),
        "largest_relative_loss_difference": float(np.abs(losses / their_losses - 1).max()),
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
        "largest_embedding_difference": max(largest(here[2], there[2]).values()),
    }
    print(
        f"training, {row['steps']} steps, loss {row['first_loss']:.3f} to {row['last_loss']:.3f}: "
        f"losses differ by {row['largest_relative_loss_difference']:.1e} relative, final "
        f"embeddings by {row['largest_embedding_difference']:.1e}"
    )
    return row


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)  # the training here runs on all of them
    open_clip = open_clip_or_skip()
    result: dict[str, Any] = {"environment": environment(), "largest_difference": {}}
    print(json.dumps(result["environment"]))
    print(f"{'peer':13} {'model':26} {'image':>8} {'text':>8}")
    for peer, cases, measure in (
        (
            "open_clip",
            test_open_clip.CASES,
            functools.partial(against_open_clip, open_clip),
        ),
        ("transformers", test_huggingface.CASES, against_transformers),
    ):
        for name in cases:
            row = measure(name)
            result["largest_difference"][f"{peer} {name}"] = row
            print(f"{peer:13} {name:26} {row['image']:8.1e} {row['text']:8.1e}", flush=True)
    result["training"] = training(open_clip)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
