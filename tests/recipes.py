"""The recipes in configs/, what they start from, and the same in small."""

import dataclasses
import runpy
from pathlib import Path
from typing import Any

from data.tars import pairs, write_tar
from small import small_config, small_model

from clip_jax.config import (
    CheckpointConfig,
    ExperimentConfig,
    ImageTowerConfig,
    LoggingConfig,
    ModelConfig,
    SourceConfig,
    StreamConfig,
    TextTowerConfig,
    TokenizerConfig,
    preset,
    to_json,
)
from clip_jax.config.load import load_config
from clip_jax.data.tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
# Recipes that name a checkpoint whose architecture they take over: it must be there to be read.
STARTS = {
    "runs/imported": small_model(),
    "runs/vit_b16": dataclasses.replace(preset("LiT-B-16-BERT-B"), name="imported"),
}
WIDTH, NUM_HEADS, VOCAB_SIZE = 32, 2, 300


def _recipes() -> dict[str, str]:
    """Name (and of its golden config) to `--config` argument: every variant of every recipe."""
    found = {}
    for path in sorted((ROOT / "configs").glob("*.py")):
        variants = runpy.run_path(str(path)).get("VARIANTS")
        if variants is None:
            found[path.stem] = str(path)
        for variant in variants or ():
            found[f"{path.stem}.{variant}"] = f"{path}:{variant}"
    return found


RECIPES = _recipes()


def make_starts(folder: Path) -> None:
    """The checkpoints that recipes start from, as far as a config is made from them."""
    for name, model in STARTS.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(to_json(small_config(model=model)))
    (folder / "runs/imported/tokenizer.json").write_text("{}")


def load_recipe(name: str, *overrides: str) -> ExperimentConfig:
    """The resolved config. The working folder has what `make_starts` makes."""
    return load_config([f"--config={RECIPES[name]}", *overrides])


def make_pairs(folder: Path) -> None:
    """32 pairs in two tars, and a tokenizer with padding 0 and end of text 2."""
    for i in range(2):
        write_tar(folder / f"{i}.tar", pairs(16 * i, 16))
    Tokenizer.train(["caption 1", "caption 23"], VOCAB_SIZE, lowercase=True).save(
        folder / "tokenizer.json"
    )


def shrunk(config: ExperimentConfig, folder: Path) -> ExperimentConfig:
    """Two steps of the same training at sizes for a CPU: kinds stay, widths and lengths go.

    folder: where `make_pairs` was. Towers that are small already stay as they are.
    """
    streams = config.data.streams
    sources = {
        "pairs": SourceConfig(
            path=f"{folder}/*.tar", access="stream" if streams else "random", captions="first"
        )
    }
    schedule = dataclasses.replace(
        config.schedule, warmup_steps=1, warmup_samples=None, warmup_epochs=None
    )
    return dataclasses.replace(
        config,
        num_steps=2,
        num_samples_seen=None,
        num_epochs=None,
        global_batch_size=16,
        model=_small(config.model),
        data=dataclasses.replace(
            config.data,
            sources=sources,
            stream=StreamConfig(num_streams=2, interleave=1, window=4),
            tokenizer=TokenizerConfig(kind="file", path=f"{folder}/tokenizer.json"),
            cache_dir=f"{folder}/cache",
        ),
        schedule=schedule,
        evaluation=dataclasses.replace(config.evaluation, sets={}),
        checkpoint=CheckpointConfig(asynchronous=False),
        logging=LoggingConfig(every_steps=1, tensorboard=False),
    )


def _small(model: ModelConfig) -> ModelConfig:
    image, text = _small_image(model.image), _small_text(model.text)
    return dataclasses.replace(
        model, image=image, text=text, embed_dim=WIDTH if image.kind != "resnet" else 16
    )


def _small_image(image: ImageTowerConfig) -> ImageTowerConfig:
    if image.width <= WIDTH:
        return image
    if image.kind == "resnet":
        return dataclasses.replace(
            image, image_size=64, width=8, num_heads=4, resnet_layers=(1, 1, 1, 1)
        )
    # 84 pixels stay fewer patches than 224 are: positions are resampled in between.
    grid = max(2, image.image_size // image.patch_size // 4)
    stem: dict[str, Any] = {}
    if image.stem == "conv":
        stem = {"stem_widths": tuple(8 for _ in image.stem_widths)}
    patch_size = 8 if image.stem == "conv" else 4
    return dataclasses.replace(
        image,
        image_size=grid * patch_size,
        patch_size=patch_size,
        width=WIDTH,
        depth=1,
        num_heads=NUM_HEADS,
        mlp_ratio=2.0,
        **stem,
    )


def _small_text(text: TextTowerConfig) -> TextTowerConfig:
    if text.width <= WIDTH:
        return text
    return dataclasses.replace(
        text,
        vocab_size=VOCAB_SIZE,
        eot_id=None if text.eot_id is None else 2,
        pad_id=0,
        context_length=max(4, text.context_length // 4),
        width=WIDTH,
        depth=1,
        num_heads=NUM_HEADS,
        mlp_ratio=2.0,
    )
