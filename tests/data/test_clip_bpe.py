"""The oracles are open_clip's `SimpleTokenizer`, which is OpenAI's, and transformers' class."""

import gzip
import importlib.resources
import pickle

import numpy as np
import pytest
from data.nasty import NASTY, TEXTS, settled
from hypothesis import given, settings
from peers import open_clip_or_skip

from clip_jax.data.cleaning import clean
from clip_jax.data.tokenizers import Tokenizer


@pytest.fixture(scope="module")
def clip():
    return Tokenizer.clip()


# Ids from OpenAI's tokenizer: they hold where no oracle is installed.
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("A Photo\tof a  CAT", [320, 1125, 539, 320, 2368]),
        ("&lt;caf\u00e9&gt;", [283, 15304, 285]),
        ("\u6f22\u5b57", [162, 120, 95, 35751, 501]),
        ("smile \U0001f600", [3490, 7334]),
        ("", []),
    ],
)
def test_known_rows(clip, text, ids):
    row = [49406, *ids, 49407]
    assert clip([text]).tolist() == [row + [0] * (77 - len(row))]


def test_facts(clip):
    assert clip.vocab_size == 49408
    assert (clip.start_id, clip.eot_id, clip.pad_id) == (49406, 49407, 0)
    assert clip(["a b"], 5).tolist() == [[49406, 320, 321, 49407, 0]]
    row = clip(["A photo of the &quot;cat&quot;, isn't it? \u6f22\u5b57 \U0001f600"])[0]
    assert clip.decode(row) == 'a photo of the " cat ", isn \'t it ? \u6f22\u5b57 \U0001f600'


def test_it_comes_back_from_json_and_pickle(clip):
    copy = pickle.loads(pickle.dumps(clip))
    assert copy.rules == clip.rules
    assert copy.to_json() == clip.to_json()
    assert (copy(NASTY) == clip(NASTY)).all()


def test_the_data_comes_with_its_license():
    folder = importlib.resources.files("clip_jax.data.clip_bpe")
    notice = folder.joinpath("NOTICE").read_text()
    assert "MIT License" in notice
    assert "OpenAI" in notice
    merges = gzip.decompress(folder.joinpath("merges.txt.gz").read_bytes()).decode().splitlines()
    assert len(merges) == 49408 - 2 * 256 - 2


@pytest.fixture(scope="module")
def open_clip_tokenizer():
    return open_clip_or_skip().tokenizer.SimpleTokenizer()


@pytest.mark.parametrize("context_length", [77, 5, 3])
def test_open_clip_gives_the_same_rows(clip, open_clip_tokenizer, context_length):
    expected = np.stack([open_clip_tokenizer(text, context_length)[0].numpy() for text in NASTY])
    np.testing.assert_array_equal(clip(NASTY, context_length), expected)


def test_open_clip_gives_the_same_rows_for_any_text(clip, open_clip_tokenizer):
    @settings(max_examples=1500, deadline=None)
    @given(text=TEXTS)
    def check(text):
        # A caption that spells out open_clip's own special tokens is text to us.
        if settled(clean(text, "whitespace", lowercase=True)) and "_of_text>" not in text:
            assert clip([text])[0].tolist() == open_clip_tokenizer(text)[0].tolist()

    check()


def test_transformers_reads_it(clip, tmp_path):
    transformers = pytest.importorskip("transformers")
    clip.save(tmp_path / "tokenizer.json")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = [
        text
        for text in NASTY
        # It does not resolve entities, mend Unicode or drop control characters.
        if text.isprintable() and text.isascii() and "&" not in text
    ]
    rows = theirs(texts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    assert clip.with_rules(pad_id=theirs.pad_token_id)(texts).tolist() == rows
    assert len(texts) >= 8
