"""Tokenizer files as transformers reads them, out of ours."""

import json
import string
from pathlib import Path
from typing import Any

from clip_jax.config import TextTowerConfig, UserError
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.interop.huggingface_families import Family
from clip_jax.interop.huggingface_files import write_json

Json = dict[str, Any]

_BLANKS: Json = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
_STRIP: Json = {"type": "Strip", "strip_left": True, "strip_right": True}
_LOWERCASE: Json = {"type": "Lowercase"}
_NO_PUNCTUATION: Json = {
    "type": "Replace",
    "pattern": {"Regex": "[" + "".join("\\" + mark for mark in string.punctuation) + "]"},
    "content": "",
}
_UNDERSCORES: Json = {"type": "Replace", "pattern": {"String": "_"}, "content": " "}
_NORMALIZERS: dict[str, list[Json]] = {
    "none": [],
    "whitespace": [{"type": "NFC"}, _BLANKS, _STRIP],
    "canonicalize": [{"type": "NFC"}, _UNDERSCORES, _NO_PUNCTUATION, _LOWERCASE, _BLANKS, _STRIP],
    "siglip": [_LOWERCASE, _NO_PUNCTUATION, _BLANKS, _STRIP],
}


def write_tokenizer(
    tokenizer: Tokenizer, text: TextTowerConfig, directory: Path, family: Family
) -> None:
    """Writes tokenizer_config.json, special_tokens_map.json and tokenizer.json or spiece.model.

    Raises UserError for rules that transformers' tokenizers do not have.
    """
    if tokenizer.rules.strip_sep:
        raise UserError("transformers' tokenizers cannot leave out the end of text (strip_sep)")
    if family.model_type == "siglip2" and not _is_gemma(tokenizer):
        raise UserError(
            "transformers 5 runs every Siglip2Model with Gemma's tokenizer, lower-cased, and this "
            "model has another one"
        )
    if tokenizer.kind == "sentencepiece":
        names, specials = _write_sentencepiece(tokenizer, directory)
    else:
        names, specials = _write_json(tokenizer, text, directory)
    inputs = ["input_ids", "attention_mask"] if family.sees_mask else ["input_ids"]
    config = names | specials | {"model_max_length": text.context_length}
    config |= {"model_input_names": inputs, "padding_side": "right", "truncation_side": "right"}
    config["processor_class"] = family.processor
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "special_tokens_map.json", specials)


def _write_json(
    tokenizer: Tokenizer, text: TextTowerConfig, directory: Path
) -> tuple[Json, dict[str, str]]:
    content, rules = json.loads(tokenizer.to_json()), tokenizer.rules
    steps = list(_NORMALIZERS[rules.clean])
    if rules.lowercase and _LOWERCASE not in steps:
        steps.append(_LOWERCASE)
    own = content.get("normalizer")
    if own is not None and not rules.skip_normalizer:
        steps.append(own)
    content["normalizer"] = {"type": "Sequence", "normalizers": steps} if steps else None
    names = _names(content)
    specials = _special_tokens(tokenizer, text, names)
    content["post_processor"] = _template(tokenizer, names)
    content["padding"] = content["truncation"] = None
    write_json(directory / "tokenizer.json", content)
    return {"tokenizer_class": "PreTrainedTokenizerFast"}, specials


def _write_sentencepiece(tokenizer: Tokenizer, directory: Path) -> tuple[Json, dict[str, str]]:
    import sentencepiece

    rules, data = tokenizer.rules, tokenizer.sentencepiece_model
    assert data is not None
    if rules.clean not in ("siglip", "canonicalize") or rules.start_id is not None:
        raise UserError(
            "transformers runs a sentencepiece model as SiglipTokenizer alone, which takes out "
            "punctuation and adds no begin of text; this tokenizer's rules are others: use its "
            "tokenizer.json"
        )
    if rules.eot_id is None:
        raise UserError("transformers' SiglipTokenizer ends every text, this tokenizer does not")
    (directory / "spiece.model").write_bytes(data)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=data)
    specials = {
        "eos_token": pieces.id_to_piece(rules.eot_id),
        "pad_token": pieces.id_to_piece(rules.pad_id),
        "unk_token": pieces.id_to_piece(pieces.unk_id()),
    }
    return {"tokenizer_class": "SiglipTokenizer", "do_lower_case": True}, specials


def _is_gemma(tokenizer: Tokenizer) -> bool:
    """Whether transformers' `Siglip2Tokenizer` rebuilds it right from its vocabulary and merges."""
    model = json.loads(tokenizer.to_json())["model"]
    vocab = model.get("vocab", {})
    return (
        model.get("type") == "BPE"
        and model.get("byte_fallback", False)
        and {"<pad>", "<eos>", "<bos>", "<unk>", "<mask>"} <= set(vocab)
    )


def _names(content: Json) -> dict[int, str]:
    """Tokens by id, those that were added to the vocabulary too."""
    vocab = content["model"].get("vocab", {})
    if isinstance(vocab, list):  # of a unigram model: pairs of token and score
        names = {number: entry[0] for number, entry in enumerate(vocab)}
    else:
        names = {number: token for token, number in vocab.items()}
    return names | {entry["id"]: entry["content"] for entry in content.get("added_tokens") or []}


def _special_tokens(
    tokenizer: Tokenizer, text: TextTowerConfig, names: dict[int, str]
) -> dict[str, str]:
    rules, content = tokenizer.rules, json.loads(tokenizer.to_json())
    specials = {}
    ends = ("cls_token", "sep_token") if text.kind == "bert" else ("bos_token", "eos_token")
    for name, number in zip(ends, (rules.start_id, rules.eot_id), strict=True):
        if number is not None:
            specials[name] = names[number]
    unknown = content["model"].get("unk_token")
    if isinstance(unknown, str):
        specials["unk_token"] = unknown
    added = {entry["id"] for entry in content.get("added_tokens") or []}
    if rules.pad_id in (*added, rules.eot_id, rules.start_id):
        specials["pad_token"] = names[rules.pad_id]
    elif text.causal and text.pooling == "eot" and rules.eot_id is not None:
        # CLIP pads with 0, which is a word too: as a special token it would no longer be one. What
        # stands after the end of text cannot reach the embedding.
        specials["pad_token"] = names[rules.eot_id]
    else:
        raise UserError(
            f"transformers pads with a special token, but token {rules.pad_id} "
            f"({names.get(rules.pad_id)!r}), which pads here, is a word"
        )
    return specials


def _template(tokenizer: Tokenizer, names: dict[int, str]) -> Json | None:
    """What puts begin and end round a text."""
    around = [tokenizer.rules.start_id, tokenizer.rules.eot_id]
    if around == [None, None]:
        return None
    text: list[Json] = [{"Sequence": {"id": "A", "type_id": 0}}]
    tokens = [
        [] if number is None else [{"SpecialToken": {"id": names[number], "type_id": 0}}]
        for number in around
    ]
    single = [*tokens[0], *text, *tokens[1]]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}, *tokens[1]]
    known = {
        names[number]: {"id": names[number], "ids": [number], "tokens": [names[number]]}
        for number in around
        if number is not None
    }
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}
