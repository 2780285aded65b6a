"""A run takes over architecture, tokenizer and framing from the checkpoint it starts from."""

import dataclasses

import pytest
from small import small_config, small_model

from clip_jax.config import ConfigError, ImageTowerConfig, StartConfig, to_json
from clip_jax.config.load import load_config

RECIPE = """
from clip_jax.config import *
def get_config():
    return to_config_dict(ExperimentConfig(
        global_batch_size=8,
        num_steps=4,
        schedule=ScheduleConfig(warmup_steps=1),
        data=DataConfig(
            sources={"pairs": SourceConfig(path="pairs.tar")},
            tokenizer=TokenizerConfig(kind="file", path="own.json"),
        ),
    ))
"""


@pytest.fixture
def folder(tmp_path):
    """A recipe, and the workdir of a sigmoid model of small towers."""
    model = small_model(name="checkpoint", logit_bias_init=-10.0, logit_scale_init=10.0)
    config = small_config(model=model)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, framing="object"))
    workdir = tmp_path / "imported"
    workdir.mkdir()
    (workdir / "config.json").write_text(to_json(config))
    (workdir / "tokenizer.json").write_text("{}")
    (tmp_path / "recipe.py").write_text(RECIPE)
    return tmp_path


def load(folder, *overrides):
    return load_config([f"--config={folder}/recipe.py", *overrides])


def test_a_model_brings_architecture_tokenizer_framing_and_loss(folder):
    config = load(folder, f"--config.start.model={folder}/imported")
    assert config.model.name == "checkpoint"
    assert config.model.image.width == 32
    assert config.loss.kind == "sigmoid"
    assert config.data.framing == "object"
    assert config.data.tokenizer.kind == "file"
    assert config.data.tokenizer.path == f"{folder}/imported/tokenizer.json"
    assert config.global_batch_size == 8


def test_the_command_line_comes_after_the_checkpoint(folder):
    start = f"--config.start.model={folder}/imported"
    config = load(folder, start, "--config.model.image.image_size=32")
    assert config.model.image.image_size == 32
    assert config.model.image.width == 32


def test_single_towers_bring_their_own_settings(folder):
    own = load(folder)
    image = load(folder, f"--config.start.image={folder}/imported")
    assert image.model.image == small_model().image
    assert image.model.text == own.model.text
    assert image.data.tokenizer == own.data.tokenizer
    text = load(folder, f"--config.start.text={folder}/imported")
    assert text.model.image == ImageTowerConfig()
    assert text.model.text == small_model().text
    assert text.data.tokenizer.path.endswith("imported/tokenizer.json")


def test_a_saved_config_needs_the_checkpoint_no_more(folder):
    config = load(folder, f"--config.start.model={folder}/imported")
    (folder / "saved.json").write_text(to_json(config))
    (folder / "imported" / "config.json").unlink()
    assert load_config([f"--config={folder}/saved.json"]) == config


def test_a_recipe_may_name_the_checkpoint(folder):
    recipe = (folder / "recipe.py").read_text()
    recipe = recipe.replace("num_steps=4", f"num_steps=4, start=StartConfig(model='{folder}/none')")
    (folder / "recipe.py").write_text(recipe)
    with pytest.raises(ConfigError, match=r"config.start.model .*none is not a workdir"):
        load(folder)
    assert load(folder, "--config.start.model=None").start == StartConfig()


def test_without_a_tokenizer_the_recipe_names_it(folder):
    (folder / "imported" / "tokenizer.json").unlink()
    start = f"--config.start.model={folder}/imported"
    assert load(folder, start).data.tokenizer.path == "own.json"
    recipe = (folder / "recipe.py").read_text()
    recipe = recipe.replace('kind="file", path="own.json"', 'kind="bpe"')
    (folder / "recipe.py").write_text(recipe)
    with pytest.raises(ConfigError, match=r"has no tokenizer.json; name the tokenizer"):
        load(folder, start)
    named = ("--config.data.tokenizer.kind=file", "--config.data.tokenizer.path=other.json")
    assert load(folder, start, *named).data.tokenizer.path == "other.json"


def test_a_locked_tower_needs_weights(folder):
    lock = "--config.start.lock=('image',)"
    with pytest.raises(ConfigError, match="would leave the image tower at random"):
        load(folder, lock)
    with pytest.raises(ConfigError, match="would leave the image tower at random"):
        load(folder, lock, f"--config.start.text={folder}/imported")
    assert load(folder, lock, f"--config.start.image={folder}/imported").start.lock == ("image",)
