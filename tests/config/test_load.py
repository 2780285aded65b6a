import textwrap

import pytest

from clip_jax.config import ConfigError, EvalSetConfig
from clip_jax.config.load import load_config


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(
        textwrap.dedent(
            """
            from clip_jax.config import (
                DataConfig, ExperimentConfig, SourceConfig, TokenizerConfig, preset, to_config_dict)

            def get_config():
                sources = {"pairs": SourceConfig(path="x.tar")}
                tokenizer = TokenizerConfig(kind="file", path="tokenizer.json")
                data = DataConfig(sources=sources, tokenizer=tokenizer)
                return to_config_dict(ExperimentConfig(model=preset("ViT-B-32"), data=data))
            """
        )
    )
    return path


def test_overrides_reach_every_level(recipe):
    config = load_config(
        [
            f"--config={recipe}",
            "--config.seed=3",
            "--config.mesh=(2,1,1)",
            "--config.model.image.stem=conv",
            "--config.model.image.stem_widths=(8,16)",
            "--config.model.image.stem_strides=(2,2)",
            "--config.data.sources.pairs.weight=2.5",
            "--config.optimizer.clip_global_norm=0.5",
        ]
    )
    assert (config.seed, config.mesh, config.model.image.stem_widths) == (3, (2, 1, 1), (8, 16))
    assert config.data.sources["pairs"].weight == 2.5
    assert config.optimizer.clip_global_norm == 0.5


def test_a_path_names_a_new_set(recipe):
    config = load_config(
        [
            f"--config={recipe}",
            "--config.evaluation.sets.mine.zero_shot_ways=0",
            "--config.evaluation.sets.mine.path=mine.tar",
            "--config.data.sources.more.path=more.tar",
            "--config.data.sources.pairs.path=other.tar",
        ]
    )
    assert config.evaluation.sets == {"mine": EvalSetConfig(path="mine.tar", zero_shot_ways=0)}
    assert {name: s.path for name, s in config.data.sources.items()} == {
        "pairs": "other.tar",
        "more": "more.tar",
    }
    with pytest.raises(ConfigError, match=r"unknown config key config\.evaluation\.sets\.mine"):
        load_config([f"--config={recipe}", "--config.evaluation.sets.mine.zero_shot_ways=0"])


def test_scoring_needs_no_source(recipe):
    recipe.write_text(recipe.read_text().replace('{"pairs": SourceConfig(path="x.tar")}', "{}"))
    assert not load_config([f"--config={recipe}"], trains=False).data.sources
    with pytest.raises(ConfigError, match=r"config\.data\.sources is empty"):
        load_config([f"--config={recipe}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.sed=3", "unknown config key config.sed; did you mean config.seed?"),
        ("--config.model.imge.width=3", "did you mean config.model.image.width?"),
        ("--config.seed=abc", "config.seed=abc"),
        ("--config.mesh=(1,2)", "config.mesh must be a tuple of 3 ints"),
        ("--config.precision=bf16", "must be one of 'float32', 'bfloat16'"),
        ("--config.num_steps=0", "must be positive"),
        ("extra", "unexpected argument 'extra'"),
        ("--config.num_steps", "--config.num_steps has no value; settings are --config.key=value"),
        ("--config.num_steps=None", "config.num_steps must be int, got None"),
        ("--config.remat=None", "did you mean 'none'?"),
        ("--config.model=None", "config.model must be a group of fields, got None"),
    ],
)
def test_bad_overrides_are_one_line(recipe, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config([f"--config={recipe}", override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "clip_global_norm"),
    [
        (["=None"], None),
        (["=0.5", "=None"], None),
        (["=None", "=0.5"], 0.5),
    ],
)
def test_none_unsets_a_field(recipe, overrides, clip_global_norm):
    field = "--config.optimizer.clip_global_norm"
    config = load_config([f"--config={recipe}", *(field + o for o in overrides)])
    assert config.optimizer.clip_global_norm == clip_global_norm


def test_none_leaves_an_unset_field_unset(recipe):
    names = ("loss.tile_size", "logging.wandb_project", "checkpoint.keep_every_steps")
    config = load_config([f"--config={recipe}", *(f"--config.{name}=None" for name in names)])
    assert config == load_config([f"--config={recipe}"])


def test_a_switch_needs_no_value(recipe):
    off = load_config([f"--config={recipe}", "--config.logging.tensorboard=false"])
    on = load_config([f"--config={recipe}", "--config.logging.tensorboard"])
    assert (off.logging.tensorboard, on.logging.tensorboard) == (False, True)


HEAD = "from clip_jax.config import *\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n\ndef get_config(:\n", " line 3: SyntaxError: invalid syntax"),
        ("import nothing_of_that_name\n", " line 1: ModuleNotFoundError: No module named"),
        ("x = 1\n", ": it has no function get_config()"),
        ("get_config = 3\n", ": it has no function get_config()"),
        ("def get_config():\n    pass\n", ": get_config() returned None, not an ExperimentConfig"),
        ("def get_config():\n    return {}\n", ": get_config() returned a dict, not an Experiment"),
        ("def get_config(x):\n    pass\n", ": it has variants, and one is to be named: --config=R"),
        (
            "def get_config():\n    return part()\n\ndef part():\n    return 1 / 0\n",
            " line 5: ZeroDivisionError: division by zero",
        ),
        ("def get_config():\n    raise OSError('two\\nlines')\n", " line 2: OSError: two lines"),
        (
            HEAD + "def get_config():\n    return preset('vit-b-32')\n",
            " line 3: unknown model 'vit-b-32'; did you mean ViT-B-32",
        ),
        (
            HEAD + "def get_config():\n    return ExperimentConfig(\n        modle=None)\n",
            " line 3: TypeError: ExperimentConfig has no field 'modle'; did you mean model?",
        ),
        (
            HEAD + "def get_config():\n    return LossConfig(zzz=1)\n",
            " line 3: TypeError: LossConfig has no field 'zzz'; its fields: kind, duplicates,",
        ),
    ],
)
def test_what_a_recipe_raises_is_one_line(tmp_path, text, message):
    path = tmp_path / "recipe.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config([f"--config={path}"])
    assert str(caught.value).startswith(f"recipe {path}{message}")
    assert "\n" not in str(caught.value)


def test_a_variant_of_a_recipe_without_any_is_one_line(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(ConfigError, match=r"get_config\(\) takes no argument, not 'b16'"):
        load_config([f"--config={path}:b16"])


def test_a_recipe_is_found_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.py").write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(ConfigError, match=r"^recipe recipe\.py line 2: ZeroDivisionError"):
        load_config(["--config=recipe.py"])


def test_a_recipe_may_return_the_dataclass(recipe):
    expected = load_config([f"--config={recipe}", "--config.seed=3"])
    recipe.write_text(recipe.read_text().replace("return to_config_dict(", "return ("))
    assert load_config([f"--config={recipe}", "--config.seed=3"]) == expected


def test_a_recipe_may_return_a_frozen_config(recipe):
    expected = load_config([f"--config={recipe}", "--config.seed=3"])
    text = recipe.read_text().replace("return to_config_dict(", "return frozen(")
    frozen = "    return FrozenConfigDict(to_config_dict(config))"
    head = "from ml_collections import FrozenConfigDict\n"
    recipe.write_text(f"{head}{text}\ndef frozen(config):\n{frozen}\n")
    assert load_config([f"--config={recipe}", "--config.seed=3"]) == expected


def test_missing_recipe(tmp_path):
    with pytest.raises(ConfigError, match="there is no recipe"):
        load_config([f"--config={tmp_path}/none.py"])
    with pytest.raises(ConfigError, match="--config=RECIPE"):
        load_config([])


def test_a_saved_config_is_a_recipe(recipe, tmp_path):
    from clip_jax.config import to_json

    config = load_config([f"--config={recipe}", "--config.seed=5"])
    saved = tmp_path / "config.json"
    saved.write_text(to_json(config))
    assert load_config([f"--config={saved}"]) == config
    assert load_config([f"--config={saved}", "--config.seed=6"]).seed == 6
