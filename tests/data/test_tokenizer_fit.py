import pytest

from clip_jax.config.errors import ConfigError
from clip_jax.config.schema import TextTowerConfig
from clip_jax.data.tokenizer_fit import check_fit
from clip_jax.data.tokenizers import Tokenizer

CAPTIONS = ["a photo of a cat"]
FITTING = {"vocab_size": 300, "eot_id": 2, "pad_id": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, 280, True)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pad_id": 7},  # behind the end of text, and nothing looks back from there
        {"kind": "bert", "pooling": "class_token", "pad_id": 7},  # masked
        {"pooling": "last", "causal": False, "eot_id": None},  # never asks for the end
    ],
)
def test_what_fits(tokenizer, config):
    check_fit(tokenizer, TextTowerConfig(**(FITTING | config)))


def test_the_table_may_be_just_large_enough(tokenizer):
    size = tokenizer.vocab_size
    check_fit(tokenizer, TextTowerConfig(**(FITTING | {"vocab_size": size})))
    with pytest.raises(ConfigError, match=f"set vocab_size to {size} or more"):
        check_fit(tokenizer, TextTowerConfig(**(FITTING | {"vocab_size": size - 1})))


@pytest.mark.parametrize(
    ("rules", "config", "message"),
    [
        ({}, {"vocab_size": 200}, r"has \d+ tokens, but .*vocab_size is 200: its embedding table"),
        ({}, {"eot_id": 3}, "end of text is token 2, but config.model.text.eot_id is 3"),
        ({}, {"eot_id": 3, "pooling": "last"}, "end of text is token 2, but"),
        ({"eot_id": None}, {}, "end of text is missing, but config.model.text.eot_id is 2"),
        ({}, {"kind": "cbow", "eot_id": None}, "end of text is token 2, but .* is None"),
        ({}, {"causal": False, "pad_id": 7}, "pads with token 0, but .*pad_id is 7, and"),
        ({}, {"pooling": "last", "pad_id": 7}, "pads with token 0, but .*pad_id is 7, and"),
        (
            {"eot_id": None},
            {"kind": "cbow", "pooling": "mean", "eot_id": None, "pad_id": 7},
            "pads with token 0, but",
        ),
    ],
)
def test_what_does_not(tokenizer, rules, config, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_fit(tokenizer.with_rules(**rules), TextTowerConfig(**(FITTING | config)))
    assert "\n" not in str(caught.value)
