import dataclasses

import pytest
from small import small_config, small_model

from clip_jax.checkpoint import Workdir
from clip_jax.config import ConfigError, DataConfig, SourceConfig, TokenizerConfig, UserError
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.training.vocabulary import prepare_tokenizer

CAPTIONS = ["A Red Fox", "a grey fox", "the snow"] * 4


class Captions(list):
    """A source without pictures."""

    def captions(self, index: int) -> tuple[str, ...]:
        return (self[index],)


SOURCES = {"pairs": Captions(CAPTIONS)}


@pytest.fixture
def workdir(tmp_path):
    return Workdir(tmp_path)


def config_of(vocab_size: int = 300, eot_id: int | None = 2, **tokenizer):
    text = dataclasses.replace(small_model().text, vocab_size=vocab_size, eot_id=eot_id)
    return small_config(
        model=small_model(text=text), data=DataConfig(tokenizer=TokenizerConfig(**tokenizer))
    )


@pytest.mark.parametrize("lowercase", [True, False])
def test_bpe_is_trained_on_the_sources(workdir, lowercase):
    tokenizer = prepare_tokenizer(config_of(kind="bpe", lowercase=lowercase), SOURCES, workdir)
    expected = Tokenizer.train(CAPTIONS, 300, lowercase)
    assert tokenizer.to_json() == expected.to_json()


def test_bpe_needs_random_access(workdir):
    config = config_of(kind="bpe")
    sources = {"pairs": SourceConfig(path="a.tar", access="stream")}
    data = dataclasses.replace(config.data, sources=sources)
    with pytest.raises(UserError, match="clip-jax tokenizer train"):
        prepare_tokenizer(dataclasses.replace(config, data=data), {}, workdir)


def test_clip_comes_with_the_package(workdir):
    tokenizer = prepare_tokenizer(config_of(49408, 49407, kind="clip"), SOURCES, workdir)
    assert tokenizer.to_json() == Tokenizer.clip().to_json()


def test_file(workdir, tmp_path):
    own = Tokenizer.train(CAPTIONS, 300, True, "wordpiece")
    own.save(tmp_path / "own.json")
    config = config_of(300, 3, kind="file", path=str(tmp_path / "own.json"))
    assert prepare_tokenizer(config, SOURCES, workdir).to_json() == own.to_json()
    config = config_of(300, 3, kind="file", path=str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"cannot read the tokenizer file .*none\.json"):
        prepare_tokenizer(config, SOURCES, workdir)


def test_the_workdirs_own_goes_first(workdir):
    own = Tokenizer.train(["other captions"], 280, True).with_rules(clean="whitespace")
    own.save(workdir.tokenizer)
    assert prepare_tokenizer(config_of(kind="bpe"), SOURCES, workdir).rules == own.rules


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of(49407, 49407, kind="clip"), r"has 49408 tokens, but .*vocab_size is 49407"),
        (config_of(49408, 5, kind="clip"), "end of text is token 49407, but .*eot_id is 5"),
    ],
)
def test_what_does_not_fit(workdir, config, message):
    with pytest.raises(ConfigError, match=message):
        prepare_tokenizer(config, SOURCES, workdir)
    assert not workdir.tokenizer.exists()
