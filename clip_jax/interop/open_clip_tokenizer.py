"""open_clip's tokenizers: CLIP's own where no other is named, else a Hugging Face one beside it."""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

from clip_jax.config import TextTowerConfig, UserError
from clip_jax.data.tokenizer_rules import parse, saved_rules
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.interop.huggingface_families import FAMILIES
from clip_jax.interop.huggingface_files import read_json, write_json
from clip_jax.interop.huggingface_tokenizer import write_tokenizer as write_huggingface
from clip_jax.interop.open_clip_fields import Fields, known, unsupported

_log = logging.getLogger(__name__)

_CLIP_VOCAB_SIZE = 49408
_FILES = (
    "tokenizer.json",
    *("spiece.model", "tokenizer.model", "sentencepiece.model"),
    *("vocab.txt", "vocab.json"),
)
# open_clip's name to our rules. Its own BPE starts from 'lower', others from 'whitespace'.
_CLEANING: dict[str, dict[str, Any]] = {
    "whitespace": {"clean": "whitespace", "lowercase": False},
    "lower": {"clean": "whitespace", "lowercase": True},
    "canonicalize": {"clean": "canonicalize", "lowercase": True},
}


def read_tokenizer(directory: Path, text_cfg: Fields) -> Tokenizer | None:
    """The tokenizer that open_clip runs with this `text_cfg`; None where its files are not there.

    Raises UserError for options that ours do not have.
    """
    kwargs = text_cfg["tokenizer_kwargs"] or {}
    name = text_cfg["hf_tokenizer_name"]
    for key, value in kwargs.items():
        if key not in (("clean", "strip_sep_token") if name else ("clean",)):
            raise unsupported(f"text_cfg.tokenizer_kwargs.{key}", value)
    cleaning = kwargs.get("clean", "whitespace" if name else "lower")
    rules = known("text_cfg.tokenizer_kwargs.clean", cleaning, _CLEANING)
    length = text_cfg["context_length"]
    if not name:
        same = cleaning == "lower" and length == _clip().rules.context_length
        return _clip() if same else _clip().with_rules(**rules, context_length=length)
    if not has_files(directory):
        return None
    tokenizer = Tokenizer.load(directory)
    # What `write` wrote knows its own cleaning; SigLIP's goes further than 'whitespace'.
    if _is_ours(directory) or (tokenizer.rules.clean == "siglip" and cleaning == "whitespace"):
        rules = {}
    strip_sep = bool(kwargs.get("strip_sep_token", False))
    return tokenizer.with_rules(**rules, strip_sep=strip_sep, context_length=length)


def has_files(directory: Path) -> bool:
    """Whether there is a Hugging Face tokenizer in the directory."""
    return any((directory / file).is_file() for file in _FILES)


def _is_ours(directory: Path) -> bool:
    file = directory / "tokenizer.json"
    return file.is_file() and saved_rules(parse(file.read_text("utf-8"))) is not None


def write_tokenizer(
    tokenizer: Tokenizer | None, directory: Path, text: TextTowerConfig, *, name: str | None
) -> Fields:
    """Writes tokenizer files unless it is CLIP's own, and returns the `text_cfg` fields for it.

    name: `hf_tokenizer_name` of the checkpoint that it came with. Raises UserError for a tokenizer
    that open_clip cannot run.
    """
    if tokenizer is None:
        if name is None and text.vocab_size != _CLIP_VOCAB_SIZE:
            raise UserError(
                "these weights come without a tokenizer, and open_clip would take CLIP's, with "
                f"{_CLIP_VOCAB_SIZE} tokens, for a text tower of {text.vocab_size}"
            )
        return {} if name is None else {"hf_tokenizer_name": name}
    if is_clip(tokenizer):
        return {}
    rules = tokenizer.rules
    kwargs: Fields = {}
    if rules.clean == "canonicalize":
        kwargs["clean"] = "canonicalize"
    elif rules.clean == "whitespace" and rules.lowercase:
        kwargs["clean"] = "lower"
    if rules.clean in ("none", "siglip"):
        _log.warning(
            "open_clip mends broken Unicode and HTML entities in captions before it tokenizes "
            "them; clip_jax does not with this tokenizer"
        )
    if rules.strip_sep and rules.pad_id != 0:
        raise UserError(
            "open_clip's strip_sep_token puts token 0 in place of the end of text, but this "
            f"tokenizer pads with {rules.pad_id}"
        )
    if rules.strip_sep:
        kwargs["strip_sep_token"] = True
    # transformers' files: open_clip loads them with its AutoTokenizer, whatever the towers are.
    family = FAMILIES["siglip" if tokenizer.kind == "sentencepiece" else "clip"]
    write_huggingface(tokenizer.with_rules(strip_sep=False), text, directory, family)
    if rules.strip_sep:
        settings = read_json(directory / "tokenizer_config.json")
        end = settings.get("sep_token") or settings.get("eos_token")  # what open_clip strips
        write_json(directory / "tokenizer_config.json", settings | {"sep_token": end})
    fields: Fields = {"hf_tokenizer_name": name or "tokenizer"}
    return fields | ({"tokenizer_kwargs": kwargs} if kwargs else {})


def is_clip(tokenizer: Tokenizer) -> bool:
    """Whether it is CLIP's own, as open_clip runs it; rows may be of any length."""
    own = _clip()
    if tokenizer.vocab_size != own.vocab_size:
        return False
    if dataclasses.replace(tokenizer.rules, context_length=own.rules.context_length) != own.rules:
        return False
    # Normalizers and templates of other libraries may stand beside it: they do not run here.
    models = [parse(side.to_json())["model"] for side in (tokenizer, own)]
    return all(models[0].get(part) == models[1][part] for part in ("type", "vocab", "merges"))


@functools.cache
def _clip() -> Tokenizer:
    return Tokenizer.clip()
