import textwrap

import pytest

from clip_jax.config import ConfigError
from clip_jax.config.load import load_config


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(
        textwrap.dedent(
            """
            from clip_jax.config import (
                DataConfig, ExperimentConfig, SourceConfig, preset, to_config_dict)

            def get_config():
                sources = {"pairs": SourceConfig(path="x.tar")}
                return to_config_dict(
                    ExperimentConfig(model=preset("ViT-B-32"), data=DataConfig(sources=sources)))
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
    ],
)
def test_bad_overrides_are_one_line(recipe, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config([f"--config={recipe}", override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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
