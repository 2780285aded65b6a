"""Captions to token ids: one class for CLIP's BPE, sentencepiece, WordPiece and trained ones."""

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clip_jax.config.errors import UserError
from clip_jax.data.cleaning import clean, encodable
from clip_jax.data.clip_bpe import clip_bpe
from clip_jax.data.token_models import (
    HuggingFaceModel,
    SentencePieceModel,
    TokenModel,
    decode_sentencepiece,
    read_huggingface,
)
from clip_jax.data.tokenizer_files import read_tokenizer
from clip_jax.data.tokenizer_rules import (
    TokenizerRules,
    embed_rules,
    parse,
    rules_of_file,
    saved_rules,
)
from clip_jax.data.vocabularies import Kind, train_vocabulary

_CLIP_CONTEXT_LENGTH = 77


class Tokenizer:
    """Turns captions into rows `start tokens end pad ...`, as `rules` says; see `TokenizerRules`.

    A caption that spells a special token out is text: unlike in the peers it cannot end its row.
    Pickles as its JSON text.

    serialized: what `to_json` returned, or the content of any Hugging Face `tokenizer.json`. Raises
    UserError if it is neither.
    """

    def __init__(self, serialized: str) -> None:
        content = parse(serialized)
        rules = saved_rules(content)
        if rules is None:
            rules = rules_of_file(content, read_huggingface(serialized))
            serialized = embed_rules(content, rules)
        self.rules = rules
        self._serialized = serialized
        self._model: TokenModel
        if content["model"].get("type") == "sentencepiece":
            self._model = SentencePieceModel(decode_sentencepiece(content))
        else:
            self._model = HuggingFaceModel(
                serialized,
                end_of_word=content["model"].get("end_of_word_suffix") or "",
                skip_normalizer=rules.skip_normalizer,
            )
        self._vocab_size = self._model.size
        self.rules.check(self._vocab_size)

    @classmethod
    def clip(cls) -> "Tokenizer":
        """CLIP's own: 49,408 tokens, padded with 0, rows of 77 (Radford et al. 2021).

        Rows are those of open_clip, whose cleaning it does (ftfy, HTML entities, blanks, lower
        case). transformers' CLIP tokenizer has no such cleaning and pads with the end of text.
        """
        rules = TokenizerRules(
            start_id=49406,
            eot_id=49407,
            clean="whitespace",
            lowercase=True,
            skip_normalizer=True,
            context_length=_CLIP_CONTEXT_LENGTH,
        )
        return cls(embed_rules(clip_bpe(), rules))

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: int, lowercase: bool, kind: Kind = "bpe"
    ) -> "Tokenizer":
        """Train one. The same captions give the same tokenizer.

        'bpe': byte-level (Sennrich et al. 2016), padding 0, start 1, end 2. 'wordpiece': BERT's
        (Devlin et al. 2019), [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3.
        vocab_size: the most tokens there may be; few captions give fewer. Raises UserError if it
        is too small for the characters, or if there are no captions.
        """
        return cls(
            train_vocabulary(captions, kind=kind, vocab_size=vocab_size, lowercase=lowercase)
        )

    @classmethod
    def from_json(cls, serialized: str) -> "Tokenizer":
        """The tokenizer of which `to_json` gave this."""
        return cls(serialized)

    @classmethod
    def load(cls, path: str | Path, *, lowercase: bool = True) -> "Tokenizer":
        """Load what `save` wrote, or another's tokenizer.

        path: a `tokenizer.json`, a sentencepiece `.model`, a BERT `vocab.txt`, or a folder with one
        of them, as Hugging Face libraries save it; see `read_tokenizer` for the rules it gets.
        lowercase: for a `.model` or `vocab.txt` named itself, which does not say. Raises UserError
        naming the file if that fails.
        """
        try:
            return cls(read_tokenizer(Path(path).expanduser(), lowercase=lowercase))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the tokenizer file {path}: {error}") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def with_rules(self, **changes: Any) -> "Tokenizer":
        """The same vocabulary under other rules: fields of `TokenizerRules`."""
        rules = dataclasses.replace(self.rules, **changes)
        return Tokenizer(embed_rules(parse(self._serialized), rules))

    def to_json(self) -> str:
        """All of it as JSON, from which the constructor makes an equal one.

        Of a tokenizer of kind 'tokenizers' it is a valid `tokenizer.json`, with our rules in it.
        """
        return self._serialized

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file, whole or not at all."""
        path = Path(path)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(self.to_json())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @property
    def kind(self) -> Literal["tokenizers", "sentencepiece"]:
        """The library that runs it."""
        return "sentencepiece" if isinstance(self._model, SentencePieceModel) else "tokenizers"

    @property
    def sentencepiece_model(self) -> bytes | None:
        """The content of its `.model` file; None where there is none."""
        return self._model.data if isinstance(self._model, SentencePieceModel) else None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._vocab_size

    @property
    def start_id(self) -> int | None:
        """The token before every text; None: there is none."""
        return self.rules.start_id

    @property
    def eot_id(self) -> int | None:
        """The token after every text; a model finds its end at the first of them. None: none."""
        return None if self.rules.strip_sep else self.rules.eot_id

    @property
    def pad_id(self) -> int:
        """The token that fills rows."""
        return self.rules.pad_id

    def __call__(
        self, texts: Sequence[str], context_length: int | None = None
    ) -> NDArray[np.int32]:
        """Return int32 [len(texts), context_length]: what `encode` returns, padded.

        context_length: None: that of `rules`. Raises UserError if it leaves no room for text.
        """
        length = self._row_length(context_length)
        encoded = self.encode(texts, length)
        rows = np.full((len(encoded), length), self.rules.pad_id, np.int32)
        for row, ids in zip(rows, encoded, strict=True):
            row[: len(ids)] = ids
        return rows

    def encode(self, texts: Sequence[str], context_length: int | None = None) -> list[list[int]]:
        """Return the token ids of each text. A text too long is cut and keeps its end.

        context_length: the most of them, as for a call. Raises UserError if it leaves no room.
        """
        if isinstance(texts, str):
            raise TypeError("texts is a sequence of captions, not one caption")
        rules = self.rules
        length = self._row_length(context_length)
        before = [] if rules.start_id is None else [rules.start_id]
        after = [] if rules.eot_id is None else [rules.eot_id]
        room = length - len(before) - len(after)
        if room < 1:
            raise UserError(
                f"context_length {length} leaves no room for text; at least {length - room + 1}"
            )
        if rules.strip_sep:  # it takes part in cutting and is padding then
            after = []
        cleaned = [encodable(clean(text, rules.clean, lowercase=rules.lowercase)) for text in texts]
        return [before + ids[:room] + after for ids in self._model.encode(cleaned)]

    def _row_length(self, context_length: int | None) -> int:
        length = self.rules.context_length if context_length is None else context_length
        if length is None:
            raise UserError("this tokenizer has no context_length of its own; give one")
        return length

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of a row up to its end token, words apart by single blanks.

        Without an end token, padding that stands for itself alone ends it.
        """
        rules = self.rules
        kept: list[int] = []
        for token in map(int, ids):
            if token == self.eot_id:
                break
            if token != rules.start_id:
                kept.append(token)
        if self.eot_id is None:
            while kept and kept[-1] == rules.pad_id:
                kept.pop()
        return self._model.decode(kept).strip()

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[str]]:
        return Tokenizer, (self.to_json(),)
