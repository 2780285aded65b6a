import functools
import json
import pickle
import unicodedata

import numpy as np
import pytest
import tokenizers as hf
from data.nasty import NASTY, SPELLED_SPECIALS
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.config.errors import UserError
from clip_jax.data.tokenizers import Tokenizer

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


def test_file_of_the_first_version():
    """As clip_jax wrote it before it kept rules: no template, no rules."""
    old = hf.Tokenizer.from_str(Tokenizer.train(CAPTIONS, 320, lowercase=True).to_json())
    content = json.loads(old.to_str()) | {"post_processor": None}
    assert "clip_jax" not in content["model"]
    tokenizer = Tokenizer(json.dumps(content))
    assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.eot_id) == (0, 1, 2)
    new = Tokenizer.train(CAPTIONS, 320, lowercase=True)
    assert (tokenizer(CAPTIONS, 16) == new(CAPTIONS, 16)).all()
    assert Tokenizer(tokenizer.to_json()).rules == tokenizer.rules


@pytest.mark.parametrize(
    "content",
    ["", "{}", "not json", json.dumps({"model": 1}), "[]", '{"model": {}}', '{"model": {"a": 1}}'],
)
def test_file_that_is_none(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=r"t.json: not a Hugging Face tokenizer.json") as caught:
        Tokenizer.load(tmp_path / "t.json")
    assert "\n" not in str(caught.value)


def test_rules_of_another_version(tokenizer):
    content = json.loads(tokenizer.to_json())
    content["model"]["clip_jax"]["more"] = 1
    with pytest.raises(UserError, match=r"rules are of another version: .*more"):
        Tokenizer(json.dumps(content))


def test_damaged_sentencepiece(t5_model):
    content = json.loads(Tokenizer.load(t5_model).to_json())
    for damaged, message in (("!", "missing or damaged"), ("YWJj", "not a sentencepiece model")):
        content["model"]["base64"] = damaged
        with pytest.raises(UserError, match=message):
            Tokenizer(json.dumps(content))


def test_file_missing(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the tokenizer file .*none.json"):
        Tokenizer.load(tmp_path / "none.json")


def tokens_of(row, tokenizer) -> list[int]:
    """The part between start and end."""
    return [int(i) for i in row if i not in (tokenizer.start_id, tokenizer.eot_id, 0)]


def test_rows_without_start(tokenizer):
    words = tokens_of(tokenizer(["a red fox"], 64)[0], tokenizer)
    changed = tokenizer.with_rules(start_id=None)
    assert changed.start_id is None
    assert changed(["a red fox"], 64)[0, : len(words) + 1].tolist() == [*words, 2]
    assert changed(["a red fox"], 2).tolist() == [[words[0], 2]]
    assert changed.decode(changed(["a red fox"], 64)[0]) == "a red fox"


def test_rows_without_end(tokenizer):
    words = tokens_of(tokenizer(["a red fox"], 64)[0], tokenizer)
    changed = tokenizer.with_rules(eot_id=None, start_id=None)
    assert changed.eot_id is None
    assert changed(["a red fox"], 64)[0, : len(words) + 1].tolist() == [*words, 0]
    assert changed(["a red fox"], 1).tolist() == [[words[0]]]
    assert changed.decode(changed(["a red fox"], 64)[0]) == "a red fox"


def test_stripped_end(tokenizer):
    """CLIPA: the end makes room and is padding then."""
    changed = tokenizer.with_rules(strip_sep=True)
    whole, stripped = tokenizer(["a red fox"], 5)[0], changed(["a red fox"], 5)[0]
    assert whole[4] == 2
    assert stripped.tolist() == [*whole[:4].tolist(), 0]
    assert changed.eot_id is None
    assert changed.decode(changed(["a red fox"], 64)[0]) == "a red fox"


def test_own_context_length(tokenizer):
    changed = tokenizer.with_rules(context_length=9)
    assert changed(["a red fox"]).shape == (1, 9)
    assert changed(["a red fox"], 7).shape == (1, 7)


RULES = {
    "bpe": {},
    "cleaned": {"clean": "canonicalize", "pad_id": 1, "start_id": None, "context_length": 9},
    "stripped": {"strip_sep": True, "skip_normalizer": True, "lowercase": True},
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("way", ["json", "pickle", "file"])
@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "t5", "gemma"])
def test_nothing_is_lost(kind, way, rules, t5_model, gemma_model, tmp_path):
    if kind in ("bpe", "wordpiece"):
        tokenizer = Tokenizer.train(CAPTIONS, 320, lowercase=True, kind=kind)
    else:
        tokenizer = Tokenizer.load({"t5": t5_model, "gemma": gemma_model}[kind])
    tokenizer = tokenizer.with_rules(**RULES[rules])
    if way == "json":
        copy = Tokenizer.from_json(tokenizer.to_json())
    elif way == "pickle":
        copy = pickle.loads(pickle.dumps(tokenizer))
    else:
        tokenizer.save(tmp_path / "tokenizer.json")
        copy = Tokenizer.load(tmp_path)  # a workdir is such a folder
    assert copy.rules == tokenizer.rules
    assert copy.kind == tokenizer.kind
    assert copy.to_json() == tokenizer.to_json()
    assert (copy(NASTY, 20) == tokenizer(NASTY, 20)).all()


def test_json_is_a_tokenizer_json(tokenizer):
    """Other libraries read it, and add the same start and end."""
    for ours in (tokenizer, Tokenizer.train(CAPTIONS, 320, True, "wordpiece")):
        theirs = hf.Tokenizer.from_str(ours.to_json())
        row = ours(["a red fox"], 64)[0]
        assert theirs.encode("a red fox").ids == row[row != ours.pad_id].tolist()


def test_sentencepiece_is_kept(t5_model):
    tokenizer = Tokenizer.load(t5_model)
    assert tokenizer.kind == "sentencepiece"
    assert tokenizer.sentencepiece_model == t5_model.read_bytes()
    assert Tokenizer.clip().sentencepiece_model is None
    assert tokenizer.decode(tokenizer(["A photo, of a CAT!"], 64)[0]) == "a photo of a cat"


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "clip", "t5", "gemma"])
@pytest.mark.parametrize("text", [*NASTY, *SPELLED_SPECIALS])
def test_every_row_ends(kind, text, t5_model, gemma_model, tokenizer):
    """One end, then padding; however long or odd the caption is."""
    if kind == "bpe":
        used = tokenizer
    elif kind == "wordpiece":
        used = _wordpiece()
    elif kind == "clip":
        used = _clip()
    else:
        used = Tokenizer.load({"t5": t5_model, "gemma": gemma_model}[kind])
    row = used([text], 16)[0].tolist()
    end = row.index(used.eot_id)
    assert set(row[end + 1 :]) <= {used.pad_id}
    if used.pad_id != used.eot_id:
        assert row.count(used.eot_id) == 1
    if used.start_id is not None:
        assert row[0] == used.start_id
        assert row.count(used.start_id) == 1


@functools.cache
def _clip():
    return Tokenizer.clip()


@functools.cache
def _wordpiece():
    return Tokenizer.train(CAPTIONS, 320, True, "wordpiece")


def test_mistakes(tokenizer):
    with pytest.raises(UserError, match="vocab_size 100 is below 259"):
        Tokenizer.train(CAPTIONS, 100, lowercase=True)
    with pytest.raises(UserError, match="no captions"):
        Tokenizer.train([], 300, lowercase=True)
    with pytest.raises(UserError, match="context_length 2 leaves no room for text; at least 3"):
        tokenizer(["a"], 2)
    with pytest.raises(UserError, match="no context_length of its own"):
        tokenizer(["a"])
    with pytest.raises(UserError, match="pad_id is 999, but it has 3"):
        tokenizer.with_rules(pad_id=999)
    with pytest.raises(TypeError, match="sequence"):
        tokenizer("a fox", 8)
