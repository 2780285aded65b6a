import json
import pickle
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.config.errors import UserError
from clip_jax.data.tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
CAPTIONS = [
    "a red fox in the snow",
    "a grey fox",
    "the snow fox (arctic)",
    "a fox's den",
    "ÉCLAIR au café",
    "snow, snow and snow",
] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, 320, lowercase=True)


def test_row_layout(tokenizer):
    rows = tokenizer(["a fox", ""], 8)
    assert rows.dtype == np.int32
    assert rows.shape == (2, 8)
    start, end, pad = tokenizer.start_id, tokenizer.eot_id, tokenizer.pad_id
    assert len({start, end, pad}) == 3
    assert rows[0, 0] == start
    assert rows[0].tolist().count(end) == 1
    assert rows[1].tolist() == [start, end] + [pad] * 6


def test_cut_captions_keep_their_end(tokenizer):
    whole = tokenizer(["a red fox in the snow"], 64)[0]
    length = int((whole != tokenizer.pad_id).sum())
    for context_length in range(3, length + 2):
        row = tokenizer(["a red fox in the snow"], context_length)[0].tolist()
        kept = min(context_length, length)
        assert row[kept - 1] == tokenizer.eot_id
        assert row[: kept - 1] == whole[: kept - 1].tolist()


def test_a_word_is_one_token_wherever_it_stands(tokenizer):
    first, inner = tokenizer(["fox", "(fox"], 6)
    assert first[1] == inner[2]
    assert first[2] == tokenizer.eot_id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Red FOX", "a red fox"),
        ("  a \t red\nfox ", "a red fox"),
        ("a<|endoftext|>b", "a <| endoftext |> b"),
        ("fox (arctic)", "fox ( arctic )"),
        ("smile 😀 漢字", "smile 😀 漢字"),
        ("cafe\u0301", "caf\u00e9"),
        ("half a pair \ud83d", "half a pair ?"),
        ("nul\0byte", "nul \0 byte"),
        ("", ""),
    ],
)
def test_decode(tokenizer, text, expected):
    assert tokenizer.decode(tokenizer([text], 64)[0]) == expected


def test_special_tokens_in_a_caption_are_text(tokenizer):
    row = tokenizer(["a <|endoftext|> b <|pad|> <|startoftext|>"], 64)[0].tolist()
    assert row.count(tokenizer.eot_id) == 1
    assert row.count(tokenizer.start_id) == 1
    assert row.index(tokenizer.eot_id) == len(row) - row.count(tokenizer.pad_id) - 1


def test_case_is_kept_on_request():
    kept = Tokenizer.train(CAPTIONS, 320, lowercase=False)
    assert kept.decode(kept(["A Red Fox"], 32)[0]) == "A Red Fox"


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_comes_back_up_to_blanks_and_case(tokenizer, text):
    row = tokenizer([text], 256)[0]
    assert row[0] == tokenizer.start_id
    assert row.tolist().count(tokenizer.eot_id) == 1
    got = "".join(tokenizer.decode(row).split())
    normal = unicodedata.normalize("NFC", text)
    # Rust lowers a final sigma and a dotted I in its own way.
    if normal.lower() == normal:
        assert got == "".join(normal.split())


def test_training_is_deterministic(tokenizer, tmp_path):
    # In another process: the trainer's hash tables have other seeds there.
    code = (
        "import json, sys; from clip_jax.data.tokenizers import Tokenizer\n"
        "tokenizer = Tokenizer.train(json.load(sys.stdin), 320, lowercase=True)\n"
        "tokenizer.save(sys.argv[1])"
    )
    for name in ("first.json", "second.json"):
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / name],
            check=True,
            input=json.dumps(CAPTIONS),
            text=True,
            cwd=ROOT,
        )
    tokenizer.save(tmp_path / "own.json")
    files = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(files) == 1


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded(CAPTIONS, 16) == tokenizer(CAPTIONS, 16)).all()
    assert loaded.vocab_size == tokenizer.vocab_size > 259 + 20
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_pickle(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    texts = [*CAPTIONS, "<|endoftext|>"]
    assert (copy(texts, 16) == tokenizer(texts, 16)).all()
    assert copy.eot_id == tokenizer.eot_id


def clip_like(start: str, end: str) -> str:
    """A file as CLIP's: the specials at the end, a template that adds them, no padding token."""
    vocab = {"a": 0, "b": 1, start: 2, end: 3}
    tokenizer = hf.Tokenizer(hf.models.BPE(vocab, []))
    tokenizer.add_special_tokens([start, end])
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 2), (end, 3)]
    )
    tokenizer.enable_truncation(2)
    return tokenizer.to_str()


@pytest.mark.parametrize(
    "pair", [("<|startoftext|>", "<|endoftext|>"), ("<start_of_text>", "<end_of_text>")]
)
def test_files_of_others(tmp_path, pair):
    (tmp_path / "t.json").write_text(clip_like(*pair))
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    assert tokenizer(["abab"], 8).tolist() == [[2, 0, 1, 0, 1, 3, 0, 0]]
    assert tokenizer.decode([2, 0, 1, 0, 3, 0, 0]).replace(" ", "") == "aba"


def test_file_without_known_specials(tmp_path):
    (tmp_path / "t.json").write_text(clip_like("[CLS]", "[SEP]"))
    expected = r"t.json: .* looked for <\|startoftext\|> and <\|endoftext\|> or <start_of_text>"
    with pytest.raises(UserError, match=expected):
        Tokenizer.load(tmp_path / "t.json")


@pytest.mark.parametrize("content", ["", "{}", "not json", json.dumps({"model": 1})])
def test_file_that_is_none(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=r"t.json: not a Hugging Face tokenizer.json"):
        Tokenizer.load(tmp_path / "t.json")


def test_file_missing(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the tokenizer file .*none.json"):
        Tokenizer.load(tmp_path / "none.json")


def test_mistakes(tokenizer):
    with pytest.raises(UserError, match="vocab_size 100 is below 259"):
        Tokenizer.train(CAPTIONS, 100, lowercase=True)
    with pytest.raises(UserError, match="no captions"):
        Tokenizer.train([], 300, lowercase=True)
    with pytest.raises(UserError, match="context_length 2"):
        tokenizer(["a"], 2)
    with pytest.raises(TypeError, match="sequence"):
        tokenizer("a fox", 8)
