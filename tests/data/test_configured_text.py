import dataclasses

import pytest
from data.tars import pairs, write_tar

from clip_jax.config import (
    ConfigError,
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    SourceConfig,
    StreamConfig,
    TextTowerConfig,
    TokenizerConfig,
    UserError,
)
from clip_jax.config.schema import PackingConfig
from clip_jax.data.configured_text import (
    choose_packing,
    configured_text,
    configured_tokenizer,
)
from clip_jax.data.packing import measure_streamed_lengths
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
        global_batch_size=32,
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


def test_packing_is_chosen(sources):
    plain = config(TokenizerConfig(kind="bpe"))
    tokenizer = configured_tokenizer(plain, sources)
    # Captions of five tokens and fewer: at least two to a row of twelve.
    assert max(map(len, tokenizer.encode([f"caption {n}" for n in range(20)], 12))) == 5
    chosen = choose_packing(plain, sources, tokenizer)
    assert chosen.group_size == 32
    assert 10 < chosen.rows <= 16
    assert choose_packing(plain, sources, tokenizer, num_devices=2).group_size == 16
    on_eight = choose_packing(plain, sources, tokenizer, num_devices=8)
    assert on_eight == PackingConfig(group_size=0)
    # What is given stays, and where next to nothing is saved a caption has a row.
    for given in ({"group_size": 0}, {"group_size": 4, "rows": 3}):
        packing = choose_packing(config(TokenizerConfig(kind="bpe"), **given), sources, tokenizer)
        assert packing == PackingConfig(**given)
    text = dataclasses.replace(TOWER, context_length=6)
    short = dataclasses.replace(plain, model=ModelConfig(text=text))
    assert choose_packing(short, sources, tokenizer) == PackingConfig(group_size=0)


def test_packing_is_chosen_where_sources_stream(sources, tmp_path):
    plain = config(TokenizerConfig(kind="bpe"))
    tokenizer = configured_tokenizer(plain, sources)
    for tar in range(3):
        write_tar(tmp_path / f"{tar}.tar", pairs(20 * tar, 20))
    stream = SourceConfig(path=f"{tmp_path}/*.tar", access="stream")
    data = dataclasses.replace(
        plain.data, sources={"a": stream}, stream=StreamConfig(num_streams=3, interleave=1)
    )
    streams = dataclasses.replace(plain, data=data)
    lengths = measure_streamed_lengths(data, tokenizer, context_length=12, num_captions=30)
    assert len(lengths) == 30  # ten of each stream
    whole = measure_streamed_lengths(data, tokenizer, context_length=12)
    captions = 8 * [f"caption {number}" for number in range(60)]
    assert sorted(whole) == sorted(len(ids) for ids in tokenizer.encode(captions, 12))
    assert choose_packing(streams, {}, tokenizer) == PackingConfig(group_size=32, rows=16)


def test_a_tokenizer_that_does_not_fit(sources):
    plain = config(TokenizerConfig(kind="bpe"))
    small = dataclasses.replace(
        plain, model=ModelConfig(text=dataclasses.replace(TOWER, vocab_size=20))
    )
    with pytest.raises(ConfigError, match="vocab_size is 20"):
        configured_text(small, sources, configured_tokenizer(plain, sources))
