import dataclasses

import pytest
from data.tars import pairs, write_tar

from clip_jax.config import (
    ConfigError,
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    SourceConfig,
    TextTowerConfig,
    TokenizerConfig,
    UserError,
)
from clip_jax.config.schema import PackingConfig
from clip_jax.data.configured_text import configured_text, configured_tokenizer
from clip_jax.data.sources.webdataset import WebdatasetSource
from clip_jax.data.text_inputs import PackedText, PaddedText
from clip_jax.data.tokenizers import Tokenizer

TOWER = TextTowerConfig(vocab_size=300, eot_id=2, context_length=12)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tar = write_tar(folder / "a.tar", pairs(0, 20))
    return {"a": WebdatasetSource(str(tar), folder / "index")}


def config(tokenizer: TokenizerConfig, **packing) -> ExperimentConfig:
    return ExperimentConfig(
        model=ModelConfig(text=TOWER),
        data=DataConfig(
            sources={"a": SourceConfig(path="a.tar")},
            tokenizer=tokenizer,
            packing=PackingConfig(**packing),
        ),
    )


def test_tokenizers(sources, tmp_path):
    captions = [f"caption {number}" for number in range(20)]
    trained = Tokenizer.train(captions, 300, lowercase=True)
    bpe = configured_tokenizer(config(TokenizerConfig(kind="bpe")), sources)
    assert bpe.to_json() == trained.to_json()
    other = Tokenizer.train(["other"], 300, lowercase=True)
    other.save(tmp_path / "other.json")
    named = config(TokenizerConfig(kind="file", path=str(tmp_path / "other.json")))
    assert configured_tokenizer(named, {}).to_json() == other.to_json()
    # That of a run wins, where there is a run.
    trained.save(tmp_path / "tokenizer.json")
    saved = configured_tokenizer(named, {}, tmp_path / "tokenizer.json")
    assert saved.to_json() == trained.to_json()
    none = configured_tokenizer(named, {}, tmp_path / "none.json")
    assert none.to_json() == other.to_json()


def test_text(sources):
    plain = config(TokenizerConfig(kind="bpe"))
    tokenizer = configured_tokenizer(plain, sources)
    assert isinstance(configured_text(plain, sources, tokenizer), PaddedText)
    packed = config(TokenizerConfig(kind="bpe"), group_size=20)
    text = configured_text(packed, sources, tokenizer)
    assert isinstance(text, PackedText)
    groups, rows, length = text(["caption 1"] * 20)["tokens"].shape
    assert (groups, length) == (1, 12)
    assert 20 * len(tokenizer.encode(["caption 1"], 12)[0]) / 12 <= rows < 20
    given = config(TokenizerConfig(kind="bpe"), group_size=4, rows=4)
    assert configured_text(given, {}, tokenizer)(["a"] * 4)["tokens"].shape == (1, 4, 12)
    with pytest.raises(UserError, match=r"packing\.rows must be given where sources stream"):
        configured_text(packed, {}, tokenizer)


def test_a_tokenizer_that_does_not_fit(sources):
    plain = config(TokenizerConfig(kind="bpe"))
    small = dataclasses.replace(
        plain, model=ModelConfig(text=dataclasses.replace(TOWER, vocab_size=20))
    )
    with pytest.raises(ConfigError, match="vocab_size is 20"):
        configured_text(small, sources, configured_tokenizer(plain, sources))
