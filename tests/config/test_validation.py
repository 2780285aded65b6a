import dataclasses

import pytest
from small import small_config

from clip_jax.config import (
    MAY_CHANGE_ON_RESUME,
    ConfigError,
    ExperimentConfig,
    UserError,
    check_devices,
    flatten,
    from_config_dict,
    to_dict,
    validate,
)
from clip_jax.data.tokenizers import Tokenizer


def changed(**overrides) -> ExperimentConfig:
    """The small config with `model__image__width=3` set deep inside."""
    values = to_dict(small_config())
    for path, value in overrides.items():
        *groups, leaf = path.split("__")
        group = values
        for name in groups:
            group = group[name]
        group[leaf] = value
    return from_config_dict(values)


def test_the_small_config_is_valid():
    assert validate(small_config()) == small_config()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_steps": 0}, "config.num_steps must be positive, got 0"),
        ({"optimizer__learning_rate": float("nan")}, "must be finite"),
        ({"schedule__end_fraction": 1.5}, "between 0 and 1, got 1.5"),
        ({"optimizer__b1": 1.0}, "config.optimizer.b1 must be 0 or more and below 1, got 1.0"),
        ({"optimizer__b2": -0.1}, "config.optimizer.b2 must be 0 or more and below 1, got -0.1"),
        ({"seed": -1}, "config.seed must be 0 or more, got -1"),
        ({"seed": 2**63}, "config.seed must be below 2**63, got 9223372036854775808"),
        ({"model__image__image_size": 20}, "not divisible by patch_size 8; nearest: 16 or 24"),
        ({"model__image__width": 33}, "width 33 is not divisible by num_heads 2"),
        (
            {"model__image__stem": "conv", "model__image__stem_widths": [8]},
            "one positive number for each convolution of the stem, got (8,) and ()",
        ),
        ({"model__image__stem_widths": [8]}, "needs config.model.image.stem=conv"),
        (
            {
                "model__image__stem": "conv",
                "model__image__stem_widths": [4, 4],
                "model__image__stem_strides": [3, 2],
            },
            "patch_size 8 is not divisible by 6, the product of stem_strides (3, 2)",
        ),
        ({"model__logit_scale_init": 200.0}, "it is the multiplier, not the temperature"),
        ({"model__text__eot_id": 64}, "outside the vocabulary of 64"),
        ({"model__text__context_length": 2}, "no room for a word"),
        ({"schedule__warmup_steps": 11}, "warmup_steps 11 is more than num_steps 10"),
        ({"num_steps": 1}, "set config.schedule.warmup_steps too, to 1 or less"),
        ({"microbatches": 5}, "global_batch_size 32 is not divisible by microbatches 5"),
        ({"mesh": [-1, -1, 1]}, "at most one -1"),
        ({"mesh": [0, 1, 1]}, "positive sizes"),
        ({"mesh": [1, 1, 4]}, "num_heads 2 is not divisible by the tensor axis 4"),
        ({"data__sources": {}}, "config.data.sources is empty"),
        ({"data__sources__pairs__path": ""}, "config.data.sources.pairs.path is empty"),
        ({"data__sources__pairs__weight": 0}, "weight must be positive"),
        ({"data__tokenizer__path": ""}, "config.data.tokenizer.path is empty"),
        ({"data__augment__crop_scale": [0.9, 0.5]}, "crop_scale must be (low, high) with 0 < low"),
        ({"data__augment__crop_scale": [0.9, 1.5]}, "are shares, at most 1"),
        ({"data__augment__object_view__pale": 1.5}, "object_view.pale is a probability, at most 1"),
        ({"loss__label_smoothing": 1.0}, "label_smoothing must be 0 or more and below 1, got 1.0"),
        ({"loss__kind": "sigmoid"}, "'sigmoid' needs a bias: config.model.logit_bias_init=-10.0"),
        ({"model__logit_bias_init": -10.0}, "-10.0 is never learned under config.loss.kind"),
        (
            {
                "loss__kind": "sigmoid",
                "model__logit_bias_init": -10.0,
                "loss__label_smoothing": 0.1,
            },
            "label_smoothing 0.1 has no meaning for kind 'sigmoid'",
        ),
        (
            {"model__image__kind": "resnet", "model__image__std": (0.5, 0.0, 0.5)},
            "config.model.image.std must be positive",
        ),
        ({"loss__beta": -1.0}, "config.loss.beta must be 0 or more"),
        ({"data__augment__hue": -0.1}, "data.augment.hue must be 0 or more"),
        ({"data__sources__pairs__first_caption": 2.0}, "first_caption must be between 0 and 1"),
        ({"evaluation__sets": {"a": {"path": "x", "templates": ["photo"]}}}, "contain {}"),
        ({"evaluation__sets": {"a": {"path": "x", "zero_shot_ways": 1}}}, "score, got 1"),
        ({"evaluation__sets": {"a": {"path": "x", "zero_shot_ways": -5}}}, "2 or more, or 0"),
        ({"data__tokenizer__kind": "bpe"}, "set config.model.text.eot_id=2, or config.data."),
        (
            {"data__tokenizer__kind": "bpe", "model__text__eot_id": 2},
            "vocab_size 259 or more (256 bytes and 3 special tokens), got 64; raise it",
        ),
    ],
)
def test_errors_name_the_numbers(overrides, message):
    with pytest.raises(ConfigError) as caught:
        validate(changed(**overrides))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_edges_are_valid():
    sets = {"a": {"path": "x", "zero_shot_ways": 2}, "b": {"path": "x", "zero_shot_ways": 0}}
    edges = changed(seed=2**63 - 1, optimizer__b1=0.0, evaluation__sets=sets, num_steps=2)
    assert validate(edges) == edges


def test_the_smallest_trained_tokenizer_is_the_smallest_valid_one():
    """The numbers of validation are those of the tokenizer that training makes."""
    tokenizer = Tokenizer.train(["a"], 259, True)
    config = changed(
        data__tokenizer={"kind": "bpe"},
        model__text__vocab_size=tokenizer.vocab_size,
        model__text__eot_id=tokenizer.eot_id,
    )
    assert validate(config) == config
    with pytest.raises(UserError, match="258 is below 259"):
        Tokenizer.train(["a"], 258, True)


def test_mesh_fills_the_devices():
    config = dataclasses.replace(small_config(), mesh=(-1, 2, 2))
    assert check_devices(config, 8) == (2, 2, 2)


@pytest.mark.parametrize(
    ("overrides", "devices", "message"),
    [
        ({"mesh": [-1, 3, 1]}, 8, "needs a multiple of 3 devices, but there are 8"),
        ({"mesh": [4, 1, 1]}, 8, "needs 4 devices, but there are 8"),
        ({"global_batch_size": 36}, 8, "8 data-parallel devices x 1 microbatches = 8; nearest: 32"),
        ({"global_batch_size": 4}, 8, "nearest: 8"),
        ({"evaluation__batch_size": 20}, 8, "config.evaluation.batch_size 20"),
        (
            {"mesh": [1, 1, -1]},
            8,
            "not divisible by the tensor axis 8 of config.mesh (1, 1, -1) = (1, 1, 8)",
        ),
    ],
)
def test_what_does_not_fit_the_devices(overrides, devices, message):
    with pytest.raises(ConfigError) as caught:
        check_devices(changed(**overrides), devices)
    assert message in str(caught.value)


def test_fields_that_may_change_on_resume_exist():
    known = flatten(ExperimentConfig())
    for name in MAY_CHANGE_ON_RESUME:
        assert any(key == name or key.startswith(name + ".") for key in known), name
