"""Files and folders of other libraries as the JSON of our tokenizers, with their rules."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers as hf

from clip_jax.config.errors import UserError
from clip_jax.data.clip_bpe import END, START, clip_like
from clip_jax.data.token_models import SentencePieceModel, encode_sentencepiece, read_huggingface
from clip_jax.data.tokenizer_rules import (
    TokenizerRules,
    embed_rules,
    parse,
    rules_of_file,
    saved_rules,
)

_SENTENCEPIECE_NAMES = ("spiece.model", "tokenizer.model", "sentencepiece.model")
_LONGEST_CONTEXT = 2**20  # transformers writes 10**30 for "not known"


def read_tokenizer(path: Path, *, lowercase: bool) -> str:
    """The JSON of the tokenizer in a file or folder, for `Tokenizer`.

    A `tokenizer.json`: by our own rules in it, else see `rules_of_file`. A `.model` named itself
    follows SigLIP: no start; the model's end; lower case where `lowercase`. One that has `</s>` and
    no start, as T5's, loses punctuation and is padded with its end (SigLIP), another is padded with
    its padding (Gemma's, for SigLIP 2). A `vocab.txt` named itself is BERT's; its captions are
    lower-cased where `lowercase` and it has no capitals.

    A folder: what its `tokenizer_config.json` says, as transformers reads it, or else as the file
    alone. Gemma's tokenizer in the folder of a SigLIP model lower-cases, as in its training.

    Raises UserError, OSError or UnicodeDecodeError if that fails.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".model":
        return _sentencepiece(SentencePieceModel(path.read_bytes()), lowercase)
    if path.suffix == ".txt":
        return _wordpiece(path, {}, lowercase=lowercase)
    return path.read_text("utf-8")


def _read_folder(folder: Path) -> str:
    settings = _settings(folder)
    name = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    models = [folder / name for name in _SENTENCEPIECE_NAMES if (folder / name).exists()]
    file = folder / "tokenizer.json"
    # transformers' SigLIP tokenizer reads the model and passes over a tokenizer.json beside it.
    if file.exists() and not (models and name == "SiglipTokenizer"):
        serialized = file.read_text("utf-8")
        content = parse(serialized)
        if saved_rules(content) is not None or not settings:
            return serialized
        return _with_settings(content, name, settings)
    if models:
        model = SentencePieceModel(models[0].read_bytes())
        if not settings:
            return _sentencepiece(model, lowercase=True)
        return embed_rules(encode_sentencepiece(model.data), _model_rules(model, name, settings))
    if (folder / "vocab.txt").exists():
        return _wordpiece(folder / "vocab.txt", settings, lowercase=True)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _clip_files(folder, settings)
    raise UserError(
        "no tokenizer in this folder: looked for tokenizer.json, "
        f"{', '.join(_SENTENCEPIECE_NAMES)}, vocab.txt, vocab.json with merges.txt"
    )


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, over special_tokens_map.json; names of tokens as plain strings.

    `lowercases` is ours: whether the model beside it was trained on lower-cased captions.
    """
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= _read_object(folder / name)
    if not settings:
        return {}
    for key, value in settings.items():
        if key.endswith("_token") and isinstance(value, Mapping):
            settings[key] = value.get("content")
    kind = str(_read_object(folder / "config.json").get("model_type", ""))
    of_siglip = kind.startswith("siglip") and "Gemma" in str(settings.get("tokenizer_class"))
    siglip2 = str(settings.get("tokenizer_class")).startswith("Siglip2Tokenizer")
    return settings | {"lowercases": of_siglip or siglip2}


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path.name} is not a JSON object")
    return content


def _context_length(settings: Mapping[str, Any]) -> int | None:
    length = settings.get("model_max_length")
    return int(length) if length is not None and length <= _LONGEST_CONTEXT else None


def _with_settings(content: dict[str, Any], name: str, settings: Mapping[str, Any]) -> str:
    """A tokenizer.json under its tokenizer_config.json."""
    normalizer = content.get("normalizer")
    if name == "BertTokenizer" and normalizer and normalizer["type"] == "BertNormalizer":
        for theirs, ours in (
            ("do_lower_case", "lowercase"),
            ("strip_accents", "strip_accents"),
            ("tokenize_chinese_chars", "handle_chinese_chars"),
        ):
            normalizer = normalizer | ({ours: settings[theirs]} if theirs in settings else {})
        content["normalizer"] = normalizer
    if settings["lowercases"]:
        steps = [{"type": "Lowercase"}, *([normalizer] if normalizer else [])]
        content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    tokenizer = read_huggingface(json.dumps(content))

    def special(key: str) -> int | None:
        token = settings.get(key)
        return tokenizer.token_to_id(token) if token is not None else None

    rules = replace(rules_of_file(content, tokenizer), context_length=_context_length(settings))
    if "add_bos_token" in settings or "add_eos_token" in settings:
        rules = replace(
            rules,
            start_id=special("bos_token") if settings.get("add_bos_token") else None,
            eot_id=special("eos_token") if settings.get("add_eos_token") else None,
        )
    pad_id = special("pad_token")
    if pad_id is not None:
        rules = replace(rules, pad_id=pad_id)
    if name == "SiglipTokenizer":
        rules = replace(rules, clean="siglip", lowercase=settings.get("do_lower_case", True))
    return embed_rules(content, rules)


def _sentencepiece(model: SentencePieceModel, lowercase: bool) -> str:
    """A `.model` that nothing is said of."""
    end, pad = model.special_id("eos"), model.special_id("pad")
    is_t5 = end is not None and end == model.piece_id("</s>") and model.special_id("bos") is None
    if is_t5 or pad is None:
        pad = end
    rules = TokenizerRules(
        eot_id=end,
        pad_id=pad or 0,
        clean="siglip" if is_t5 else "none",
        lowercase=lowercase,
    )
    return embed_rules(encode_sentencepiece(model.data), rules)


def _model_rules(
    model: SentencePieceModel, name: str, settings: Mapping[str, Any]
) -> TokenizerRules:
    """The rules of a `.model` in a folder of transformers, whose classes have their defaults."""

    def special(key: str, default: str) -> int | None:
        return model.piece_id(str(settings.get(key) or default))

    rules = TokenizerRules(context_length=_context_length(settings))
    if name == "SiglipTokenizer":
        return replace(
            rules,
            eot_id=special("eos_token", "</s>"),
            pad_id=special("pad_token", "</s>") or 0,
            clean="siglip",
            lowercase=settings.get("do_lower_case", True),
            context_length=rules.context_length or 64,
        )
    if name == "T5Tokenizer":
        pad = special("pad_token", "<pad>")
        return replace(rules, eot_id=special("eos_token", "</s>"), pad_id=pad or 0)
    if name in ("GemmaTokenizer", "Siglip2Tokenizer"):
        of_siglip = settings["lowercases"]
        has_start = settings.get("add_bos_token", not of_siglip)
        has_end = settings.get("add_eos_token", of_siglip)
        return replace(
            rules,
            start_id=special("bos_token", "<bos>") if has_start else None,
            eot_id=special("eos_token", "<eos>") if has_end else None,
            pad_id=special("pad_token", "<pad>") or 0,
            lowercase=of_siglip,
        )
    # XLM-R's, for one, gives pieces other ids than its model does.
    raise UserError(
        f"do not know how {name or 'a tokenizer without tokenizer_class'} uses its sentencepiece "
        "model; add its tokenizer.json, or name the .model itself"
    )


def _wordpiece(file: Path, settings: Mapping[str, Any], *, lowercase: bool) -> str:
    """BERT's `vocab.txt`: a token a line."""
    lines = file.read_text("utf-8").removesuffix("\n").split("\n")
    vocab = {token: number for number, token in enumerate(lines)}
    names = {
        key: str(settings.get(f"{key}_token") or default)
        for key, default in (
            ("unk", "[UNK]"),
            ("pad", "[PAD]"),
            ("cls", "[CLS]"),
            ("sep", "[SEP]"),
        )
    }
    missing = [token for token in names.values() if token not in vocab]
    if missing:
        raise UserError(f"not a BERT vocabulary: it has no {', '.join(missing)}")
    specials = {*names.values(), "[MASK]"}
    has_capitals = any(token != token.lower() for token in vocab if token not in specials)
    tokenizer = hf.Tokenizer(hf.models.WordPiece(vocab, unk_token=names["unk"]))
    tokenizer.normalizer = hf.normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", lowercase and not has_capitals),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = hf.decoders.WordPiece()
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        single=f"{names['cls']} $A {names['sep']}",
        special_tokens=[(token, vocab[token]) for token in (names["cls"], names["sep"])],
    )
    tokenizer.add_special_tokens([token for token in vocab if token in specials])
    rules = TokenizerRules(
        start_id=vocab[names["cls"]],
        eot_id=vocab[names["sep"]],
        pad_id=vocab[names["pad"]],
        context_length=_context_length(settings),
    )
    return embed_rules(json.loads(tokenizer.to_str()), rules)


def _clip_files(folder: Path, settings: Mapping[str, Any]) -> str:
    """transformers' CLIP tokenizer in its older form, with transformers' own normalization."""
    vocab = _read_object(folder / "vocab.json")
    if START not in vocab or END not in vocab:
        raise UserError(f"vocab.json has no {START} and {END}: not CLIP's; add its tokenizer.json")
    lines = (folder / "merges.txt").read_text("utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    pad_id = vocab.get(settings.get("pad_token") or END)
    rules = TokenizerRules(
        start_id=vocab[START],
        eot_id=vocab[END],
        pad_id=vocab[END] if pad_id is None else pad_id,
        context_length=_context_length(settings),
    )
    return embed_rules(clip_like(vocab, merges), rules)
