"""What surrounds the tokens of a caption, and where a tokenizer's file says so."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers as hf

from clip_jax.config.errors import UserError
from clip_jax.data.cleaning import Cleaning
from clip_jax.data.clip_bpe import END, START

PAD = "<|pad|>"

_KEY = "clip_jax"  # in `model`, where readers of a tokenizer.json pass over what they do not know
_START_END_PAIRS = (
    (START, END),  # OpenAI CLIP's, and those trained here
    ("<start_of_text>", "<end_of_text>"),  # open_clip's
    ("[CLS]", "[SEP]"),  # BERT's
)
_PADS = (PAD, "[PAD]", "<pad>")
_PROBES = ("a", "the", "1", ".")  # some text that the vocabulary knows


@dataclass(frozen=True, kw_only=True)
class TokenizerRules:
    """How a row of token ids is laid out: `start text end pad pad ...`.

    A text too long is cut so that start and end stay. They are kept in the tokenizer's JSON.
    """

    start_id: int | None = None  # None: rows begin with the text
    eot_id: int | None = None  # None: rows end with the text
    pad_id: int = 0
    strip_sep: bool = False  # the end makes room and is padding then (CLIPA, open_clip's name)
    clean: Cleaning = "none"  # see `cleaning.clean`
    lowercase: bool = False  # before the model; the model's own file may lower-case as well
    skip_normalizer: bool = False  # of a tokenizer.json, where `clean` does its work
    context_length: int | None = None  # of rows where the caller does not say

    def check(self, size: int) -> None:
        """Raises UserError where an id is not one of `size` tokens."""
        for name in ("start_id", "eot_id", "pad_id"):
            number = getattr(self, name)
            if number is not None and not 0 <= number < size:
                raise UserError(f"the tokenizer's {name} is {number}, but it has {size} tokens")


def parse(serialized: str) -> dict[str, Any]:
    """A tokenizer's JSON. Raises UserError if it is none."""
    try:
        content = json.loads(serialized)
    except json.JSONDecodeError as error:
        raise UserError(f"not a Hugging Face tokenizer.json: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError("not a Hugging Face tokenizer.json: it has no model")
    return content


def embed_rules(content: dict[str, Any], rules: TokenizerRules) -> str:
    """The JSON of a tokenizer with its rules, from which `saved_rules` takes them again."""
    model = content["model"] | {_KEY: dataclasses.asdict(rules)}
    return json.dumps(content | {"model": model}, ensure_ascii=False)


def saved_rules(content: dict[str, Any]) -> TokenizerRules | None:
    """The rules in a tokenizer's JSON; None in a file that is not ours."""
    saved = content["model"].get(_KEY)
    if saved is None:
        return None
    try:
        return TokenizerRules(**saved)
    except TypeError as error:
        raise UserError(f"the tokenizer's rules are of another version: {error}") from None


def rules_of_file(content: Mapping[str, Any], tokenizer: hf.Tokenizer) -> TokenizerRules:
    """The rules of a `tokenizer.json` that are not ours.

    Start and end: those its template adds; where it has no template, a pair of known names.
    Padding: its own, else a known name, else token 0, as open_clip pads.
    """
    if content.get("post_processor") is not None:
        start_id, eot_id = _template(tokenizer)
    else:
        start_id = eot_id = None
        for pair in _START_END_PAIRS:
            ids = [tokenizer.token_to_id(token) for token in pair]
            if None not in ids:
                start_id, eot_id = ids
                break
    padding = content.get("padding")
    if padding is not None:
        pad_id = int(padding["pad_id"])
    else:
        known = (tokenizer.token_to_id(token) for token in _PADS)
        pad_id = next((number for number in known if number is not None), 0)
    return TokenizerRules(start_id=start_id, eot_id=eot_id, pad_id=pad_id)


def _template(tokenizer: hf.Tokenizer) -> tuple[int | None, int | None]:
    """The token that the file's template sets before a text and the one after it."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for probe in _PROBES:
        encoding = tokenizer.encode(probe)
        added = [bool(flag) for flag in encoding.special_tokens_mask]
        if False in added:
            break
    else:
        raise UserError(f"the tokenizer knows none of {' '.join(_PROBES)}: cannot try its template")
    first, last = added.index(False), len(added) - added[::-1].index(False)
    before, after = encoding.ids[:first], encoding.ids[last:]
    if len(before) > 1 or len(after) > 1:
        raise UserError(
            f"the tokenizer's template sets tokens {before} before and {after} after a text; at "
            "most one each"
        )
    return (before[0] if before else None), (after[0] if after else None)
