"""The oracles are sentencepiece itself and transformers' tokenizers, on the same files."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from data.nasty import NASTY, SPELLED_SPECIALS, TEXTS
from hypothesis import given, settings

from clip_jax.config.errors import UserError
from clip_jax.data.cleaning import clean, encodable
from clip_jax.data.tokenizers import Tokenizer

LENGTH = 32
TEXT = "a photo of the cat dog fox it's isn't 12345 <b> snake_case ! caf\u00e9 \u6f22\u5b57"
WORDS = [*TEXT.split(" "), "\U0001f600"]
CAPTIONS = [" ".join(WORDS[place:] + WORDS[:place]) for place in range(len(WORDS))] * 5


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    return module


def rows_of(theirs, texts: list[str], length: int = LENGTH) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        rows = theirs(texts, padding="max_length", truncation=True, max_length=length)
    return np.array(rows["input_ids"])


def check_equal(ours: Tokenizer, theirs, length: int = LENGTH) -> None:
    np.testing.assert_array_equal(ours(NASTY, length), rows_of(theirs, NASTY, length))

    @settings(max_examples=200, deadline=None)
    @given(text=TEXTS)
    def check(text):
        # They take `<pad>` in a caption for the token, we for text.
        if not any(token.lower() in text.lower() for token in theirs.all_special_tokens):
            assert ours([text], length).tolist() == rows_of(theirs, [text], length).tolist()

    check()


def write_json(path: Path, content) -> Path:
    path.write_text(json.dumps(content), "utf-8")
    return path


# ---- Sentencepiece -----------------------------------------------------------------------------


@pytest.mark.parametrize("lowercase", [True, False])
def test_model_of_t5_is_siglips(t5_model, lowercase):
    tokenizer = Tokenizer.load(t5_model, lowercase=lowercase)
    assert (tokenizer.start_id, tokenizer.eot_id, tokenizer.pad_id) == (None, 1, 1)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(t5_model))
    for text in NASTY + SPELLED_SPECIALS:
        cleaned = encodable(clean(text, "siglip", lowercase=lowercase))
        ids = [*theirs.encode(cleaned)[: LENGTH - 1], 1]
        assert tokenizer([text], LENGTH)[0].tolist() == ids + [1] * (LENGTH - len(ids))


@pytest.mark.parametrize("lowercase", [True, False])
def test_model_of_gemma_is_that_of_siglip_2(gemma_model, lowercase):
    tokenizer = Tokenizer.load(gemma_model, lowercase=lowercase)
    assert (tokenizer.start_id, tokenizer.eot_id, tokenizer.pad_id) == (None, 1, 0)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(gemma_model))
    for text in NASTY + SPELLED_SPECIALS:
        cleaned = encodable(clean(text, "none", lowercase=lowercase))
        ids = [*theirs.encode(cleaned)[: LENGTH - 1], 1]
        assert tokenizer([text], LENGTH)[0].tolist() == ids + [0] * (LENGTH - len(ids))


def test_model_without_padding_pads_with_its_end(tmp_path):
    trainer = sentencepiece.SentencePieceTrainer
    with open(tmp_path / "own.model", "wb") as model:
        trainer.train(  # as the library does unasked: <unk> 0, <s> 1, </s> 2, no padding
            sentence_iterator=iter(["a photo of a cat"] * 9),
            model_writer=model,
            vocab_size=30,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    tokenizer = Tokenizer.load(tmp_path / "own.model")
    assert (tokenizer.start_id, tokenizer.eot_id, tokenizer.pad_id) == (None, 2, 2)
    assert tokenizer.rules.clean == "none"


@pytest.mark.parametrize("content", [b"", b"none", b"\0" * 99])
def test_damaged_model(tmp_path, content):
    (tmp_path / "a.model").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.model: not a sentencepiece model") as caught:
        Tokenizer.load(tmp_path / "a.model")
    assert "\n" not in str(caught.value)


def test_siglip_folder(transformers, t5_model, tmp_path):
    transformers.SiglipTokenizer(str(t5_model)).save_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert ours.rules.context_length == 64
    check_equal(ours, transformers.SiglipTokenizer.from_pretrained(tmp_path))
    # They pass over a tokenizer.json beside the model.
    (tmp_path / "tokenizer.json").write_text("none")
    assert (Tokenizer.load(tmp_path)(NASTY) == ours(NASTY)).all()


def test_siglip_folder_that_keeps_case(transformers, t5_model, tmp_path):
    transformers.SiglipTokenizer(str(t5_model), do_lower_case=False).save_pretrained(tmp_path)
    theirs = transformers.SiglipTokenizer.from_pretrained(tmp_path)
    check_equal(Tokenizer.load(tmp_path), theirs)


GEMMA = {
    "add_bos_token": False,
    "add_eos_token": True,
    "bos_token": "<bos>",
    "eos_token": {"__type": "AddedToken", "content": "<eos>", "special": True},
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "model_max_length": 64,
    "padding_side": "right",
}


@pytest.mark.parametrize("name", ["Siglip2Tokenizer", "GemmaTokenizer"])
@pytest.mark.parametrize("bos", [False, True])
def test_gemma_folders(transformers, gemma_model, tmp_path, name, bos):
    shutil.copy(gemma_model, tmp_path / "tokenizer.model")
    changed = GEMMA | {"tokenizer_class": name, "add_bos_token": bos}
    write_json(tmp_path / "tokenizer_config.json", changed)
    if name.startswith("Siglip"):
        write_json(tmp_path / "config.json", {"model_type": "siglip2"})
    theirs = getattr(transformers, name).from_pretrained(tmp_path, padding_side="right")
    from_model = Tokenizer.load(tmp_path)
    assert from_model.kind == "sentencepiece"
    assert from_model.rules.context_length == 64
    check_equal(from_model, theirs)
    theirs.save_pretrained(tmp_path)  # a tokenizer.json beside it
    write_json(tmp_path / "tokenizer_config.json", changed)
    from_json = Tokenizer.load(tmp_path)
    assert from_json.kind == "tokenizers"
    check_equal(from_json, theirs)


def test_gemma_in_a_siglip_model_lowercases(gemma_model, tmp_path):
    """Google's folders of SigLIP 2 with a fixed resolution: the class says nothing of case."""
    shutil.copy(gemma_model, tmp_path / "tokenizer.model")
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GemmaTokenizer"})
    cased = Tokenizer.load(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "siglip"})
    lower = Tokenizer.load(tmp_path)
    assert (lower(["A PHOTO"], 16) == Tokenizer.load(gemma_model)(["a photo"], 16)).all()
    assert (cased(["A PHOTO"], 16) != lower(["A PHOTO"], 16)).any()
    assert (cased.start_id, cased.eot_id) == (2, None)


def test_gemmas_tokenizer_json_in_a_siglip_model_lowercases(transformers, gemma_model, tmp_path):
    """The file itself keeps case; the class, or the model beside it, does not."""
    shutil.copy(gemma_model, tmp_path / "tokenizer.model")
    settings = GEMMA | {"tokenizer_class": "GemmaTokenizer"}
    write_json(tmp_path / "tokenizer_config.json", settings)
    transformers.GemmaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    write_json(tmp_path / "tokenizer_config.json", settings)
    cased = Tokenizer.load(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "siglip2"})
    lower = Tokenizer.load(tmp_path)
    check_equal(
        lower, transformers.Siglip2Tokenizer.from_pretrained(tmp_path, padding_side="right")
    )
    assert (lower(["A PHOTO"]) == cased(["a photo"])).all()
    assert (lower(["A PHOTO"]) != cased(["A PHOTO"])).any()


def test_t5_folder(transformers, t5_model, tmp_path):
    """open_clip's SigLIP: T5's tokenizer.json, with its own cleaning before."""
    shutil.copy(t5_model, tmp_path / "spiece.model")
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=0, pad_token="</s>")
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert (ours.start_id, ours.eot_id, ours.pad_id) == (None, 1, 1)
    check_equal(ours, theirs)
    cleaned = [clean(text, "canonicalize", lowercase=True) for text in NASTY]
    rows = ours.with_rules(clean="canonicalize")(NASTY, LENGTH)
    np.testing.assert_array_equal(rows, rows_of(theirs, cleaned))


def test_models_with_other_ids_than_their_pieces(t5_model, tmp_path):
    shutil.copy(t5_model, tmp_path / "sentencepiece.model")
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer"})
    with pytest.raises(UserError, match=r"XLMRobertaTokenizer uses .*; add its tokenizer.json"):
        Tokenizer.load(tmp_path)


# ---- BERT --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def bert(request, tmp_path_factory):
    """A vocab.txt, and whether its captions are lower-cased."""
    captions = [caption.title() for caption in CAPTIONS] + CAPTIONS
    content = json.loads(Tokenizer.train(captions, 400, request.param, "wordpiece").to_json())
    vocab = content["model"]["vocab"]
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token in sorted(vocab, key=vocab.get)), "utf-8")
    return path, request.param


def test_vocabulary_alone(transformers, bert):
    path, lowercase = bert
    theirs = transformers.BertTokenizer(str(path), do_lower_case=lowercase)
    ours = Tokenizer.load(path)
    assert (ours.start_id, ours.eot_id, ours.pad_id) == (2, 3, 0)
    check_equal(ours, theirs)


def test_lowercase_of_a_vocabulary_is_ours_to_say(bert):
    path, lowercase = bert
    as_is = Tokenizer.load(path, lowercase=False)
    same = (as_is(["CAT"], 8) == Tokenizer.load(path)(["CAT"], 8)).all()
    assert same == (not lowercase)


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize("accents", [None, True, False])
def test_bert_folder(transformers, bert, tmp_path, file, accents):
    path, lowercase = bert
    theirs = transformers.BertTokenizer(
        str(path), do_lower_case=lowercase, strip_accents=accents, tokenize_chinese_chars=False
    )
    theirs.save_pretrained(tmp_path)
    if file == "vocab.txt":
        (tmp_path / "tokenizer.json").unlink()
        shutil.copy(path, tmp_path / file)
    check_equal(Tokenizer.load(tmp_path), theirs)


def test_bert_config_goes_before_its_tokenizer_json(transformers, bert, tmp_path):
    path, lowercase = bert
    transformers.BertTokenizer(str(path), do_lower_case=lowercase).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write_json(tmp_path / "tokenizer_config.json", config | {"do_lower_case": not lowercase})
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    check_equal(Tokenizer.load(tmp_path), theirs)


def test_clipa(transformers, bert):
    """open_clip's HFTokenizer with `strip_sep_token`: rows of 32, the separator made padding."""
    path, lowercase = bert
    theirs = transformers.BertTokenizer(str(path), do_lower_case=lowercase)
    ours = Tokenizer.load(path).with_rules(clean="whitespace", strip_sep=True)
    cleaned = [clean(text, "whitespace", lowercase=False) for text in NASTY]
    rows = rows_of(theirs, cleaned)
    np.testing.assert_array_equal(ours(NASTY, LENGTH), np.where(rows == 3, 0, rows))


def test_vocabulary_without_special_tokens(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[CLS]\na\n")
    expected = r"vocab\.txt: not a BERT vocabulary: it has no \[UNK\], \[SEP\]"
    with pytest.raises(UserError, match=expected):
        Tokenizer.load(tmp_path / "vocab.txt")


# ---- CLIP --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(transformers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    Tokenizer.clip().save(folder / "tokenizer.json")
    theirs = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    (folder / "tokenizer.json").unlink()
    theirs.save_pretrained(folder)
    return folder, theirs


def test_clip_folder(clip_folder):
    """By the rules of transformers, which are not open_clip's: see `Tokenizer.clip`."""
    folder, theirs = clip_folder
    ours = Tokenizer.load(folder)
    assert (ours.start_id, ours.eot_id, ours.pad_id) == (49406, 49407, 49407)
    assert ours.rules.context_length == 77
    check_equal(ours, theirs, 77)


def test_clip_folder_of_the_older_form(clip_folder, tmp_path):
    folder, theirs = clip_folder
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    write_json(tmp_path / "vocab.json", model["vocab"])
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}", "utf-8")
    check_equal(Tokenizer.load(tmp_path), theirs, 77)
    write_json(tmp_path / "tokenizer_config.json", {"pad_token": "!", "model_max_length": 76})
    ours = Tokenizer.load(tmp_path)
    assert ours.pad_id == 0
    assert ours([""]).shape == (1, 76)


def test_older_form_of_another_tokenizer(tmp_path):
    write_json(tmp_path / "vocab.json", {"a": 0})
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=r"vocab\.json has no <\|startoftext\|>"):
        Tokenizer.load(tmp_path)


# ---- Folders -----------------------------------------------------------------------------------


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer in this folder: looked for tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_damaged_settings(tmp_path, t5_model):
    shutil.copy(t5_model, tmp_path / "spiece.model")
    for content, message in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match=rf"tokenizer_config\.json {message}"):
            Tokenizer.load(tmp_path)


def test_special_tokens_map(tmp_path):
    """Older folders name their tokens there alone."""
    tokenizer = Tokenizer.train(CAPTIONS, 300, True, "wordpiece")
    content = json.loads(tokenizer.to_json())
    del content["model"]["clip_jax"]
    write_json(tmp_path / "tokenizer.json", content)
    assert Tokenizer.load(tmp_path).pad_id == 0
    write_json(tmp_path / "special_tokens_map.json", {"pad_token": {"content": "[MASK]"}})
    assert Tokenizer.load(tmp_path).pad_id == 4


def test_a_folder_of_ours_needs_no_settings(tmp_path):
    """A workdir: what lies beside its tokenizer.json changes nothing."""
    tokenizer = Tokenizer.train(CAPTIONS, 300, True).with_rules(strip_sep=True)
    tokenizer.save(tmp_path / "tokenizer.json")
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False, "pad_token": "a"})
    assert Tokenizer.load(tmp_path).rules == tokenizer.rules
