import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from clip_jax.config.errors import UserError
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.data.vocabularies import train_vocabulary

ROOT = Path(__file__).parents[2]
RANDOM = random.Random(0)
LETTERS = "abcdefghijklmnopqrstuvwxyz\u00e4\u00f6\u00fc\u6f22\u5b57\u304b\u306a"
CAPTIONS = [
    " ".join("".join(RANDOM.choices(LETTERS, k=RANDOM.randint(1, 9))) for _ in range(8))
    for _ in range(100)
]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_training_is_deterministic(kind, tmp_path):
    # In other processes: the trainers' hash tables have other seeds there.
    code = (
        "import json, sys; from clip_jax.data.tokenizers import Tokenizer\n"
        "tokenizer = Tokenizer.train(json.load(sys.stdin), 320, True, sys.argv[2])\n"
        "tokenizer.save(sys.argv[1])"
    )
    for name in ("first.json", "second.json"):
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / name, kind],
            check=True,
            input=json.dumps(CAPTIONS),
            text=True,
            cwd=ROOT,
        )
    Tokenizer.train(CAPTIONS, 320, True, kind).save(tmp_path / "own.json")
    files = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(files) == 1


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_special_tokens_come_first(kind):
    tokenizer = Tokenizer.train(CAPTIONS, 400, True, kind)
    layout = (tokenizer.pad_id, tokenizer.start_id, tokenizer.eot_id)
    assert layout == ((0, 1, 2) if kind == "bpe" else (0, 2, 3))
    assert tokenizer.vocab_size == 400


def vocabulary(captions: list[str], vocab_size: int) -> dict[str, int]:
    content = train_vocabulary(captions, kind="wordpiece", vocab_size=vocab_size, lowercase=True)
    return json.loads(content)["model"]["vocab"]


def test_wordpieces():
    vocab = vocabulary(["the red fox", "the grey fox", "foxes"] * 10, 300)
    assert list(vocab.values()) == list(range(len(vocab)))
    assert {"fox", "the", "##e", "e"} <= set(vocab)
    tokenizer = Tokenizer.train(
        ["the red fox", "the grey fox", "foxes"] * 10, 300, True, "wordpiece"
    )
    row = tokenizer(["The FOX ?"], 8)[0].tolist()
    assert row == [2, vocab["the"], vocab["fox"], vocab["[UNK]"], 3, 0, 0, 0]


def test_characters_leave_room_for_words():
    many = ["".join(map(chr, range(0x4E00, 0x4E00 + 500))), "fox " * 100]
    vocab = vocabulary(many, 220)
    assert len(vocab) <= 220
    assert "fox" in vocab
    # The rarest go; of equally rare ones those with the larger code.
    kept = [token for token in vocab if len(token) == 1 and token >= "\u4e00"]
    assert kept == [chr(0x4E00 + place) for place in range(len(kept))]
    assert len(kept) == (220 - 5) // 4 - len("fox")


def test_case_is_kept_on_request():
    for kind in ("bpe", "wordpiece"):
        kept = Tokenizer.train(["A Red Fox"] * 5, 300, False, kind)
        assert kept.decode(kept(["A Red Fox"], 32)[0]) == "A Red Fox"


@pytest.mark.parametrize(
    ("kind", "vocab_size", "captions", "message"),
    [
        ("bpe", 258, ["a"], "vocab_size 258 is below 259"),
        ("wordpiece", 199, ["a"], "vocab_size 199 is below 200"),
        ("bpe", 300, [], "no captions to train a tokenizer on"),
        ("wordpiece", 300, [], "no captions to train a tokenizer on"),
    ],
)
def test_mistakes(kind, vocab_size, captions, message):
    with pytest.raises(UserError, match=message):
        train_vocabulary(captions, kind=kind, vocab_size=vocab_size, lowercase=True)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_captions_without_text(kind):
    tokenizer = Tokenizer.train(["", " "], 300, True, kind)
    assert tokenizer([""], 4)[0].tolist() == [tokenizer.start_id, tokenizer.eot_id, 0, 0]
