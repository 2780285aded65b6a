"""Packed text holds what padded text holds."""

import pickle
import struct
import zlib

import numpy as np
import pytest

from clip_jax.config import UserError
from clip_jax.data.text_inputs import PackedText, PaddedText
from clip_jax.data.tokenizers import Tokenizer

LENGTH = 12
CAPTIONS = [
    "a cat",
    "two dogs that run along a beach in the evening sun while it rains",
    "",
    "a cat",
    "a red bicycle in front of a house",
    "sunset",
    "people waiting for a train",
    "a",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.clip()


def test_packed_rows_hold_the_tokens_of_padded_rows(tokenizer):
    padded = PaddedText(tokenizer, LENGTH)(CAPTIONS)["tokens"]
    packed = PackedText(tokenizer, LENGTH, group_size=4, rows=3)(CAPTIONS)
    assert {name: (array.shape, array.dtype) for name, array in packed.items()} == {
        "tokens": ((2, 3, LENGTH), np.int32),
        "segments": ((2, 3, LENGTH), np.int32),
        "eot": ((2, 4), np.int32),
        "text_id": ((8,), np.int32),
        "num_cut_captions": ((), np.int32),
    }
    assert packed["num_cut_captions"] == 0  # the one cut at LENGTH is cut without packing too
    lengths = 1 + (padded == tokenizer.eot_id).argmax(axis=1)
    assert lengths.max() == LENGTH
    for i, (row, length) in enumerate(zip(padded, lengths, strict=True)):
        tokens, segments = (packed[name][i // 4].ravel() for name in ("tokens", "segments"))
        end = 1 + packed["eot"][i // 4, i % 4]
        np.testing.assert_array_equal(tokens[end - length : end], row[:length])
        assert len(set(segments[end - length : end])) == 1
    assert (packed["tokens"] != 0).sum() == lengths.sum()


def test_text_ids_are_equal_for_equal_captions(tokenizer):
    padded = PaddedText(tokenizer, LENGTH)(CAPTIONS)["tokens"]
    text = PackedText(tokenizer, LENGTH, group_size=8, rows=3)
    packed = text(CAPTIONS)
    assert packed["num_cut_captions"] > 0  # to room for them, but not in the ids
    same = (padded[:, None] == padded[None]).all(axis=2)
    np.testing.assert_array_equal(packed["text_id"][:, None] == packed["text_id"][None], same)
    assert same.sum() == len(CAPTIONS) + 2
    expected = zlib.crc32(struct.pack("<2i", 49406, 49407))  # of the empty caption
    assert packed["text_id"][2] == np.uint32(expected).view(np.int32)
    copied = pickle.loads(pickle.dumps(text))(CAPTIONS)
    for name, array in packed.items():
        np.testing.assert_array_equal(copied[name], array)


def test_what_cannot_be_packed_is_told(tokenizer):
    with pytest.raises(UserError, match="rows 1 of 12 tokens cannot hold 8 captions of three; "):
        PackedText(tokenizer, LENGTH, group_size=8, rows=1)
    with pytest.raises(UserError, match="does not mark"):
        PackedText(tokenizer.with_rules(eot_id=None), LENGTH, group_size=8, rows=8)
    with pytest.raises(ValueError, match="7 captions are not whole groups of 4"):
        PackedText(tokenizer, LENGTH, group_size=4, rows=3)(CAPTIONS[:7])
