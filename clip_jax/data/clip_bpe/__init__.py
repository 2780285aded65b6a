"""CLIP's byte-pair encoding as the content of a `tokenizer.json` (Radford et al. 2021).

The merges are OpenAI's, under the MIT license: see NOTICE in this folder.
"""

import gzip
import importlib.resources
from typing import Any

START, END = "<|startoftext|>", "<|endoftext|>"
# The way to cut a text into words, of the released code.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
END_OF_WORD = "</w>"
# open_clip ignores case in it. On lower-cased text that leaves two oddities: a long s is an s after
# an apostrophe, and an iota under a vowel (U+0345), a mark that folds to a letter, is passed over.
_WORDS_CASELESS = "'\u017f|" + WORDS.replace("[^", "[^\u0345")

_NUM_BYTES = 256
# The bytes that stand for themselves, as characters; the others get the characters from 256 on.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]


def clip_bpe() -> dict[str, Any]:
    """A `tokenizer.json` of 49,408 tokens that transformers reads as its CLIP tokenizer.

    Its normalizer is that of transformers; `Tokenizer.clip` cleans texts in the way of OpenAI and
    open_clip instead.
    """
    data = importlib.resources.files(__package__).joinpath("merges.txt.gz").read_bytes()
    merges = [line.split(" ") for line in gzip.decompress(data).decode("utf-8").splitlines()]
    others = [byte for byte in range(_NUM_BYTES) if byte not in _PRINTABLE]
    bytes_as_text = [chr(byte) for byte in _PRINTABLE]
    bytes_as_text += [chr(_NUM_BYTES + place) for place in range(len(others))]
    tokens = [
        *bytes_as_text,
        *(byte + END_OF_WORD for byte in bytes_as_text),
        *(left + right for left, right in merges),
        START,
        END,
    ]
    vocab = {token: number for number, token in enumerate(tokens)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(vocab, token) for token in (START, END)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _WORDS_CASELESS},
                    "behavior": "Removed",
                    "invert": True,
                },
                _byte_level(use_regex=False),
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, vocab[END]],
            "cls": [START, vocab[START]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": END_OF_WORD,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def clip_like(vocab: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    """Another vocabulary in transformers' pipeline: a folder's `vocab.json` and `merges.txt`."""
    content = clip_bpe()
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = WORDS
    content["model"] |= {"vocab": vocab, "merges": merges}
    content["added_tokens"] = [_added_token(vocab, token) for token in (START, END)]
    content["post_processor"] |= {"sep": [END, vocab[END]], "cls": [START, vocab[START]]}
    return content


def _added_token(vocab: dict[str, int], token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": vocab[token], "content": token, **flags, "special": True}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }
