import json

import pytest
import tokenizers as hf

from clip_jax.config.errors import UserError
from clip_jax.data.tokenizers import Tokenizer


def words(*specials: str, template: str | None = None, known: tuple[str, ...] = ("a", "b")):
    """A tokenizer of whole words, its special tokens behind them."""
    vocab = {token: place for place, token in enumerate((*known, "?", *specials))}
    tokenizer = hf.Tokenizer(hf.models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(specials))
    if template is not None:
        tokenizer.post_processor = hf.processors.TemplateProcessing(
            single=template, special_tokens=[(token, vocab[token]) for token in specials]
        )
    return tokenizer


@pytest.mark.parametrize(
    ("template", "row"),
    [
        ("<s> $A </s>", [3, 0, 1, 4, 0]),
        ("$A </s>", [0, 1, 4, 0, 0]),
        ("<s> $A", [3, 0, 1, 0, 0]),
        ("$A", [0, 1, 0, 0, 0]),
        (None, [0, 1, 0, 0, 0]),
    ],
)
def test_template(template, row):
    tokenizer = Tokenizer(words("<s>", "</s>", template=template).to_str())
    assert tokenizer(["a b"], 5).tolist() == [row]
    assert (tokenizer.start_id is not None) == (row[0] == 3)
    assert (tokenizer.eot_id is not None) == (4 in row)


@pytest.mark.parametrize(
    "pair",
    [
        ("<|startoftext|>", "<|endoftext|>"),
        ("<start_of_text>", "<end_of_text>"),
        ("[CLS]", "[SEP]"),
    ],
)
def test_known_names_without_a_template(pair):
    tokenizer = Tokenizer(words(*pair).to_str())
    assert tokenizer(["a b"], 5).tolist() == [[3, 0, 1, 4, 0]]


@pytest.mark.parametrize("name", ["<|pad|>", "[PAD]", "<pad>"])
def test_known_padding(name):
    assert Tokenizer(words("<s>", name).to_str()).pad_id == 4


def test_padding_and_truncation_of_the_file():
    """Its padding token is ours; the lengths are the caller's."""
    tokenizer = words("<s>", "</s>", template="<s> $A </s>")
    tokenizer.enable_padding(length=9, pad_id=1, pad_token="b")
    tokenizer.enable_truncation(3)
    assert Tokenizer(tokenizer.to_str())(["a a a"], 6).tolist() == [[3, 0, 0, 0, 4, 1]]


def test_templates_of_more():
    tokenizer = words("<s>", "</s>", template="<s> $A </s> </s>")
    with pytest.raises(UserError, match=r"sets tokens \[3\] before and \[4, 4\] after a text"):
        Tokenizer(tokenizer.to_str())


def test_templates_of_tokenizers_without_words():
    content = json.loads(words("<s>", template="<s> $A", known=()).to_str())
    content["model"] = {"type": "BPE", "vocab": {"<s>": 0}, "merges": []}
    content["added_tokens"][0]["id"] = 0
    content["post_processor"]["special_tokens"]["<s>"]["ids"] = [0]
    with pytest.raises(UserError, match=r"knows none of a the 1 \.: cannot try its template"):
        Tokenizer(json.dumps(content))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"start_id": 5}, "start_id is 5, but it has 5 tokens"),
        ({"eot_id": -1}, "eot_id is -1, but"),
        ({"pad_id": 7}, "pad_id is 7, but"),
    ],
)
def test_ids_that_are_none(rules, message):
    with pytest.raises(UserError, match=message):
        Tokenizer(words("<s>", "</s>").to_str()).with_rules(**rules)
