"""The two libraries that cut texts into tokens, behind one face."""

import base64
import binascii
from collections.abc import Sequence
from typing import Any, Protocol

import tokenizers as hf

from clip_jax.config.errors import UserError


class TokenModel(Protocol):
    """Text to ids and back, without begin, end and padding."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    @property
    def size(self) -> int:
        """One more than the largest id."""
        ...


class HuggingFaceModel:
    """A `tokenizer.json`. Special tokens that a text spells out are text to it.

    end_of_word: what marks it in tokens, as in CLIP's. Raises UserError if `serialized` is no such
    file's content.
    """

    def __init__(
        self, serialized: str, *, end_of_word: str = "", skip_normalizer: bool = False
    ) -> None:
        self._tokenizer = read_huggingface(serialized)
        if skip_normalizer:
            self._tokenizer.normalizer = None
        self._end_of_word = end_of_word
        # A caption that spells a special token out must not end its text: it is text.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        text = str(self._tokenizer.decode(list(ids)))  # the library drops special tokens
        return text.replace(self._end_of_word, " ") if self._end_of_word else text

    @property
    def size(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1


class SentencePieceModel:
    """A sentencepiece `.model` (Kudo and Richardson 2018). Raises UserError if it is not one."""

    def __init__(self, data: bytes) -> None:
        import sentencepiece

        self.data = data
        if not data:  # the library takes that for a model
            raise UserError("not a sentencepiece model: it is empty")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise UserError(f"not a sentencepiece model: {first_line(error)}") from None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        rows: list[list[int]] = self._processor.encode(list(texts), out_type=int, num_threads=1)
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode(list(ids)))

    @property
    def size(self) -> int:
        return int(self._processor.get_piece_size())

    def special_id(self, name: str) -> int | None:
        """The id of 'bos', 'eos', 'pad' or 'unk'; None where the model has none."""
        number = int(getattr(self._processor, f"{name}_id")())
        return number if number >= 0 else None

    def piece_id(self, piece: str) -> int | None:
        """The id of a piece; None where the model has none of that name."""
        number = int(self._processor.piece_to_id(piece))
        return number if self._processor.id_to_piece(number) == piece else None


def read_huggingface(serialized: str) -> hf.Tokenizer:
    """The library's object. Raises UserError if this is not the content of a `tokenizer.json`."""
    try:
        return hf.Tokenizer.from_str(serialized)
    except Exception as error:  # noqa: BLE001 - the library raises bare Exceptions
        raise UserError(f"not a Hugging Face tokenizer.json: {first_line(error)}") from None


def decode_sentencepiece(content: dict[str, Any]) -> bytes:
    """The bytes of the `.model` in our JSON. Raises UserError where they are damaged."""
    try:
        return base64.b64decode(content["model"]["base64"], validate=True)
    except (KeyError, TypeError, binascii.Error):
        raise UserError("its sentencepiece model is missing or damaged") from None


def encode_sentencepiece(data: bytes) -> dict[str, Any]:
    """Our JSON for a `.model`, which `decode_sentencepiece` reads."""
    return {"model": {"type": "sentencepiece", "base64": base64.b64encode(data).decode("ascii")}}


def first_line(error: Exception) -> str:
    """Messages of libraries on one line."""
    return " ".join(str(error).split())
