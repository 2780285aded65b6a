"""Captions to token ids: byte-level BPE, trained here or loaded from a `tokenizer.json`."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers as hf
from numpy.typing import NDArray

from clip_jax.config.errors import UserError

PAD, START, END = "<|pad|>", "<|startoftext|>", "<|endoftext|>"
_START_END_PAIRS = (
    (START, END),  # OpenAI CLIP's, and ours
    ("<start_of_text>", "<end_of_text>"),  # open_clip's
)
# CLIP's way to cut a text into words (Radford et al. 2021, `simple_tokenizer.py`).
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_NUM_BYTES = 256


class Tokenizer:
    """Turns captions into rows `<start> tokens <end> <pad>...`.

    A model finds the end of a text at the first `eot_id` in its row. Pickles as its JSON text.

    serialized: the content of a Hugging Face `tokenizer.json`. Raises UserError if that is not one
    or has no start and end tokens that are known.
    """

    def __init__(self, serialized: str) -> None:
        try:
            self._tokenizer = hf.Tokenizer.from_str(serialized)
        except Exception as error:  # noqa: BLE001 - the library raises bare Exceptions
            raise UserError(f"not a Hugging Face tokenizer.json: {error}") from None
        for start, end in _START_END_PAIRS:
            start_id, end_id = map(self._tokenizer.token_to_id, (start, end))
            if start_id is not None and end_id is not None:
                break
        else:
            pairs = " or ".join(f"{start} and {end}" for start, end in _START_END_PAIRS)
            raise UserError(f"the tokenizer has no start and end of text: looked for {pairs}")
        self.start_id: int = start_id
        self.eot_id: int = end_id
        # Where a vocabulary has no padding token, open_clip pads with 0.
        self.pad_id: int = self._tokenizer.token_to_id(PAD) or 0
        # A caption that spells a special token out must not end its text: it is text.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, lowercase: bool) -> "Tokenizer":
        """Train byte-level BPE (Sennrich et al. 2016). The same captions give the same tokenizer.

        vocab_size: the most tokens there may be; few captions give fewer. Raises UserError if it
        is too small for the bytes, or if there are no captions.
        """
        specials = [PAD, START, END]
        smallest = _NUM_BYTES + len(specials)
        if vocab_size < smallest:
            raise UserError(
                f"vocab_size {vocab_size} is below {smallest}: {_NUM_BYTES} bytes and "
                f"{len(specials)} special tokens; raise model.text.vocab_size"
            )
        tokenizer = hf.Tokenizer(hf.models.BPE())
        steps: list[hf.normalizers.Normalizer] = [hf.normalizers.NFC()]
        if lowercase:
            steps.append(hf.normalizers.Lowercase())
        tokenizer.normalizer = hf.normalizers.Sequence(steps)
        # A blank before every word, at the start of a text and after a bracket too, makes it one
        # word wherever it stands. (CLIP marks the ends of words, which takes 256 tokens more.)
        tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence(
            [
                hf.pre_tokenizers.Split(hf.Regex(_WORDS), behavior="removed", invert=True),
                hf.pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
            ]
        )
        tokenizer.decoder = hf.decoders.ByteLevel()
        trainer = hf.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        cleaned = [_encodable(caption) for caption in captions]
        if not cleaned:
            raise UserError("no captions to train a tokenizer on; add a training source")
        tokenizer.train_from_iterator(cleaned, trainer)
        return cls(tokenizer.to_str())

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a `tokenizer.json`. Raises UserError naming the file if that fails."""
        try:
            return cls(Path(path).read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the tokenizer file {path}: {error}") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def to_json(self) -> str:
        """The content of a `tokenizer.json`, from which the constructor makes an equal one."""
        return str(self._tokenizer.to_str())

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`, whole or not at all."""
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
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def __call__(self, texts: Sequence[str], context_length: int) -> NDArray[np.int32]:
        """Return int32 [len(texts), context_length]. A text too long is cut and keeps its end."""
        if isinstance(texts, str):
            raise TypeError("texts is a sequence of captions, not one caption")
        if context_length < 3:
            raise UserError(f"context_length {context_length} leaves no room for text; at least 3")
        rows = np.full((len(texts), context_length), self.pad_id, np.int32)
        encoded = self._tokenizer.encode_batch_fast(
            [_encodable(text) for text in texts], add_special_tokens=False
        )
        for row, encoding in zip(rows, encoded, strict=True):
            ids = encoding.ids[: context_length - 2]
            row[0] = self.start_id
            row[1 : len(ids) + 1] = ids
            row[len(ids) + 1] = self.eot_id
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of a row up to its end token, words apart by single blanks."""
        kept: list[int] = []
        for token in ids:
            if token == self.eot_id:
                break
            kept.append(int(token))  # the library drops special tokens
        return str(self._tokenizer.decode(kept)).strip()

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[str]]:
        return Tokenizer, (self.to_json(),)


def _encodable(text: str) -> str:
    """JSON can hold half a surrogate pair, which no UTF-8 can."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
