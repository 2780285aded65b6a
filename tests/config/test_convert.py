import dataclasses

import pytest

from clip_jax.config import (
    ConfigError,
    DataConfig,
    ExperimentConfig,
    SourceConfig,
    flatten,
    from_config_dict,
    load_json,
    preset,
    to_config_dict,
    to_dict,
    to_json,
)

CONFIG = ExperimentConfig(
    model=preset("ViT-B-16"), data=DataConfig(sources={"a": SourceConfig(path="x.tar")})
)


def test_round_trips():
    assert from_config_dict(to_config_dict(CONFIG)) == CONFIG
    assert from_config_dict(to_dict(CONFIG)) == CONFIG


def test_json_file_round_trips(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(CONFIG))
    assert load_json(path) == CONFIG


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b'{"name": "caf\xe9"}', "is not UTF-8 text: invalid continuation byte at 13"),
        (b"[1]", "must hold a JSON object of settings, as clip-jax config prints; it holds a list"),
        (b"null", "it holds a NoneType"),
        (
            b'{"num_step": 3}',
            ": unknown config key config.num_step; did you mean config.num_steps?",
        ),
        (b'{"data": {"sources": {"a.b": {}}}}', "an entry 'a.b': leave the dot out"),
    ],
)
def test_a_json_file_that_holds_no_config_is_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_json(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_json_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_json(tmp_path)


def test_a_field_that_is_none_accepts_its_type():
    values = to_config_dict(CONFIG)
    values.logging.wandb_project = "name"
    assert from_config_dict(values).logging.wandb_project == "name"
    with pytest.raises(TypeError):
        values.logging.wandb_project = 8


def test_an_int_is_a_float_but_a_bool_is_no_int():
    assert from_config_dict({"optimizer": {"learning_rate": 1}}).optimizer.learning_rate == 1.0
    with pytest.raises(ConfigError, match=r"config\.seed must be int, got True"):
        from_config_dict({"seed": True})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_step": 3}, "unknown config key config.num_step; did you mean config.num_steps?"),
        ({"model": {"image": {"widht": 1}}}, "did you mean config.model.image.width?"),
        ({"learning_rate": 1.0}, "did you mean config.optimizer.learning_rate?"),
        ({"mesh": [1, 2]}, "config.mesh must be a tuple of 3 ints"),
        ({"mesh": [1, 2, "x"]}, "config.mesh[2] must be int"),
        ({"precision": "bfloat"}, "did you mean 'bfloat16'?"),
        ({"model": 3}, "config.model must be a group of fields"),
        ({"data": {"sources": {"a": {"pth": ""}}}}, "did you mean config.data.sources.a.path?"),
        ({"optimizer": {"learning_rate": "1e-3"}}, "must be float, got '1e-3'"),
    ],
)
def test_errors_are_one_line_that_name_the_remedy(values, message):
    with pytest.raises(ConfigError) as caught:
        from_config_dict(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flatten_reaches_every_leaf():
    flat = flatten(CONFIG)
    assert flat["model.image.width"] == 768
    assert flat["data.sources.a.path"] == "x.tar"
    assert not any(dataclasses.is_dataclass(value) for value in flat.values())
