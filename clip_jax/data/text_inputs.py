"""Captions to the arrays that the text tower takes: a caption to a row, or packed."""

import zlib
from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np
from numpy.typing import NDArray

from clip_jax.config.errors import UserError
from clip_jax.data.packing import fewest_rows, pack_captions
from clip_jax.data.tokenizers import Tokenizer

TextArrays = dict[str, NDArray[np.int32]]


class PaddedText:
    """A caption to a row, padded: {'tokens': int32 [b, L]}."""

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        self._tokenizer, self._context_length = tokenizer, context_length

    def __call__(self, captions: Sequence[str]) -> TextArrays:
        return {"tokens": self._tokenizer(captions, self._context_length)}


class PackedText:
    """Groups of G consecutive captions in R rows each; the same tokens as `PaddedText` has.

    rows: R, from `packing.choose_rows`. Raises UserError where they cannot hold three tokens of
    each caption, or where the tokenizer marks no end of text.
    """

    def __init__(
        self, tokenizer: Tokenizer, context_length: int, group_size: int, rows: int
    ) -> None:
        if tokenizer.eot_id is None:
            raise UserError(
                "captions are packed by their ends, which this tokenizer does not mark; use "
                "config.data.packing.group_size=0"
            )
        if rows < (fewest := fewest_rows(group_size, context_length)):
            raise UserError(
                f"config.data.packing.rows {rows} of {context_length} tokens cannot hold "
                f"{group_size} captions of three; use {fewest} or more"
            )
        self._tokenizer, self._context_length = tokenizer, context_length
        self._group_size, self._rows = group_size, rows

    def __call__(self, captions: Sequence[str]) -> TextArrays:
        """{'tokens', 'segments', 'eot', 'text_id', 'num_cut_captions'} of b captions.

        tokens, segments: int32 [b/G, R, L], segments 1, 2, ... in each row and 0 at padding. eot:
        int32 [b/G, G], r * L + position of each end of text. text_id: int32 [b], equal for equal
        captions (by their tokens before packing). num_cut_captions: int32 [], those cut to make
        room, without those cut at L, as they are in `PaddedText`. b is divisible by G.
        """
        if len(captions) % self._group_size:
            raise ValueError(f"{len(captions)} captions are not whole groups of {self._group_size}")
        ids = self._tokenizer.encode(captions, self._context_length)
        packed = pack_captions(
            ids,
            group_size=self._group_size,
            rows=self._rows,
            row_length=self._context_length,
            pad_id=self._tokenizer.pad_id,
        )
        return {
            "tokens": packed.tokens,
            "segments": packed.segments,
            "eot": packed.eot,
            "text_id": text_ids(ids),
            "num_cut_captions": np.array(packed.num_cut, np.int32),
        }


def text_ids(ids: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """int32 [b], equal for equal token ids (CRC-32).

    Two different captions of a batch of 32,768 share one by chance in one batch of eight.
    """
    values = np.fromiter(chain.from_iterable(ids), "<i4", sum(map(len, ids))).tobytes()
    ends = [4 * end for end in accumulate(map(len, ids))]
    starts = [0, *ends[:-1]]
    hashes = [zlib.crc32(values[start:end]) for start, end in zip(starts, ends, strict=True)]
    return np.array(hashes, np.uint32).view(np.int32)
