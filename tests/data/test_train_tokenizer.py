import pytest
from data.tars import pairs, write_tar

from clip_jax.config.errors import UserError
from clip_jax.config.schema import SourceConfig
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.data.train_tokenizer import train_tokenizer


@pytest.fixture
def sources(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(0, 20))
    write_tar(tmp_path / "b.tar", pairs(100, 5))
    return {name: SourceConfig(path=str(tmp_path / f"{name}.tar")) for name in ("a", "b")}


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_captions_of_all_sources(sources, tmp_path, kind):
    output = tmp_path / "tokenizer.json"
    result = train_tokenizer(
        sources, tmp_path / "cache", kind=kind, vocab_size=300, lowercase=True, output=output
    )
    assert result.output == output
    assert result.num_captions == 25
    loaded = Tokenizer.load(output)
    texts = [f"caption {number}" for number in [*range(20), *range(100, 105)]]
    rows = loaded(texts, 32)
    assert (rows == result.tokenizer(texts, 32)).all()
    lengths = (rows != loaded.pad_id).sum(axis=1)
    assert result.tokens_per_caption == pytest.approx(lengths.mean())
    assert result.longest_caption == lengths.max()


def test_no_file_is_overwritten(sources, tmp_path):
    output = tmp_path / "tokenizer.json"
    output.write_text("mine")
    with pytest.raises(UserError, match=r"tokenizer\.json is there already"):
        train_tokenizer(
            sources, tmp_path, kind="bpe", vocab_size=300, lowercase=True, output=output
        )
    assert output.read_text() == "mine"


def test_missing_folder(sources, tmp_path):
    output = tmp_path / "none" / "tokenizer.json"
    with pytest.raises(UserError, match=r"there is no folder .*none"):
        train_tokenizer(
            sources, tmp_path, kind="bpe", vocab_size=300, lowercase=True, output=output
        )
    assert not output.parent.exists()


def test_mistakes_leave_no_file(sources, tmp_path):
    output = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="vocab_size 10 is below"):
        train_tokenizer(sources, tmp_path, kind="bpe", vocab_size=10, lowercase=True, output=output)
    assert not output.exists()
