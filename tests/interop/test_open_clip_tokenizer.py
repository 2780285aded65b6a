"""open_clip's tokenizers and ours on the same directories."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers as hf
from interop import open_clip_models as peer
from peers import open_clip_or_skip

from clip_jax.config import UserError
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.interop import open_clip as ours
from clip_jax.interop.open_clip_fields import filled_in
from clip_jax.interop.open_clip_tokenizer import is_clip, read_tokenizer

CAPTIONS = [
    "a photo of a cat",
    "Two dogs, running on a beach!",
    "1 red_apple",
    "a",
    "fish &amp; chips   on a\ttable",
    "a dog and " * 30,
]
ENTITY = 4


@pytest.fixture(scope="module")
def open_clip():
    return open_clip_or_skip()


@pytest.fixture
def tiny(open_clip, tmp_path):
    return peer.save(peer.build(open_clip, peer.TINY), peer.TINY, tmp_path / "tiny")


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_open_clip_runs_our_tokenizers(open_clip, tiny, tmp_path, kind, caplog):
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=400, lowercase=True, kind=kind)
    length = peer.TINY["text_cfg"]["context_length"]
    weights = ours.read(tiny)
    for name, rules in {
        "as trained": {},
        "whitespace": {"clean": "whitespace", "lowercase": True},
        "canonicalize": {"clean": "canonicalize", "lowercase": True},
        "strip_sep": {"clean": "whitespace", "strip_sep": True},
    }.items():
        variant = tokenizer.with_rules(**rules) if rules else tokenizer
        text = dataclasses.replace(weights.model.text, eot_id=variant.eot_id, pooling="last")
        model = dataclasses.replace(weights.model, text=text)
        directory = tmp_path / name
        directory.mkdir()
        caplog.clear()
        ours.write(dataclasses.replace(weights, model=model, tokenizer=variant), directory)
        again = ours.read(directory)
        assert again.model == model
        expected = variant(CAPTIONS, length)
        np.testing.assert_array_equal(again.tokenizer(CAPTIONS, length), expected)
        found = open_clip.get_tokenizer(f"local-dir:{directory}")(CAPTIONS).numpy()
        # open_clip resolves HTML entities for every tokenizer; where ours does not, it is said.
        differs = [i for i, row in enumerate(found) if not np.array_equal(row, expected[i])]
        assert differs == ([] if rules else [ENTITY])
        assert ("HTML entities" in caplog.text) == (not rules)


def test_tokenizers_that_do_not_fit(tiny, tmp_path):
    weights = ours.read(tiny)
    assert weights.tokenizer is None
    alone = dataclasses.replace(weights, extras={})
    with pytest.raises(UserError, match="without a tokenizer"):
        ours.write(alone, tmp_path)
    config = json.loads((tiny / "open_clip_config.json").read_text())
    del config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]
    (tiny / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="49408"):
        ours.read(tiny)


def with_text_cfg(directory, **text_cfg):
    """The directory, with a config that says this of its text tower."""
    cfg = peer.TINY | {"text_cfg": peer.TINY["text_cfg"] | text_cfg}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    return directory, filled_in("text_cfg", cfg["text_cfg"])


def unigram(directory):
    """Files as timm's SigLIP repositories have them: T5's tokenizer, padded with its end."""
    tokenizer = hf.Tokenizer(hf.models.Unigram())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = hf.trainers.UnigramTrainer(
        vocab_size=80, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([caption.lower() for caption in CAPTIONS], trainer)
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def wordpiece(directory):
    """BERT's files."""
    words = {word.strip(",!.") for caption in CAPTIONS for word in caption.lower().split()}
    pieces = [
        *"abcdefghijklmnopqrstuvwxyz&_!,1;",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words | set(pieces))]
    (directory / "vocab.txt").write_text("\n".join(vocab) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (unigram, {"clean": "canonicalize"}),
        (unigram, {"clean": "lower"}),
        (unigram, None),
        (wordpiece, {"strip_sep_token": True}),
        (wordpiece, None),
    ],
)
def test_we_run_theirs(open_clip, tmp_path, make, kwargs):
    make(tmp_path)
    directory, text_cfg = with_text_cfg(
        tmp_path, hf_tokenizer_name="any", tokenizer_kwargs=kwargs or {}
    )
    found = read_tokenizer(directory, text_cfg)
    expected = open_clip.get_tokenizer(f"local-dir:{directory}")(CAPTIONS).numpy()
    np.testing.assert_array_equal(found(CAPTIONS), expected)
    has_end = kwargs is None or "strip_sep_token" not in kwargs
    assert (found.eot_id is not None) == has_end


def test_clips_own_is_not_written(open_clip, tmp_path):
    directory, text_cfg = with_text_cfg(tmp_path, vocab_size=49408, hf_tokenizer_name=None)
    found = read_tokenizer(directory, text_cfg)
    assert is_clip(found)
    expected = open_clip.get_tokenizer(f"local-dir:{directory}")(CAPTIONS).numpy()
    np.testing.assert_array_equal(found(CAPTIONS), expected)
    assert not is_clip(found.with_rules(clean="canonicalize"))


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer_kwargs": {"reduction_mask": "random"}},
        {"tokenizer_kwargs": {"clean": "thoroughly"}},
        {"tokenizer_mode": "clips"},
    ],
)
def test_odd_options_are_named(tmp_path, fields):
    with pytest.raises(UserError, match=r"text_cfg\.tokenizer_"):
        read_tokenizer(*with_text_cfg(tmp_path, **fields))
