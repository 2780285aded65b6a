"""Packed rows hold every caption once, whole or cut by the rule, wherever its group is made."""

import dataclasses

import numpy as np
import pytest
from data.tars import write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.config import DataConfig, SourceConfig, StreamConfig, UserError
from clip_jax.data.packing import (
    SHORTEST,
    choose_rows,
    fewest_rows,
    lay_out,
    measure_lengths,
    measure_streamed_lengths,
    pack_captions,
)
from clip_jax.data.tokenizers import Tokenizer

START, END, PAD = 1, 2, 9


@st.composite
def groups(draw):
    """Captions of whole groups, and rows that may be too few for them but never hopelessly so."""
    row_length = draw(st.integers(SHORTEST, 20))
    group_size = draw(st.integers(1, 12))
    caption = st.lists(st.integers(10, 99), max_size=row_length - 2)
    num_groups = draw(st.integers(1, 3))
    texts = draw(st.lists(caption, min_size=num_groups * group_size, max_size=36))
    texts = texts[: len(texts) // group_size * group_size]
    ids = [[START, *text, END] for text in texts]
    rows = draw(st.integers(fewest_rows(group_size, row_length), group_size))
    return ids, {"group_size": group_size, "rows": rows, "row_length": row_length, "pad_id": PAD}


def captions_of(packed):
    """What the arrays hold: the captions by group and place, read by their segments and ends."""
    captions = []
    for tokens, segments, eot in zip(packed.tokens, packed.segments, packed.eot, strict=True):
        tokens, segments = tokens.ravel(), segments.ravel()
        for end in eot.tolist():
            row = end // packed.tokens.shape[2] * packed.tokens.shape[2]
            start = end
            while start > row and segments[start - 1] == segments[end]:
                start -= 1
            captions.append(tokens[start : end + 1].tolist())
    return captions


@settings(max_examples=150, deadline=None)
@given(groups())
def test_every_caption_is_there_once(example):
    ids, sizes = example
    packed = pack_captions(ids, **sizes)
    found = captions_of(packed)
    num_cut = 0
    for caption, whole in zip(found, ids, strict=True):
        num_cut += len(caption) < len(whole)
        assert caption[:-1] == whole[: len(caption) - 1]  # its start ...
        assert caption[-1] == END  # ... and its end
        assert len(caption) >= min(len(whole), SHORTEST)
    assert packed.num_cut == num_cut
    # Nothing else is there: no caption lies on another, and the rest is padding.
    assert (packed.segments > 0).sum() == sum(map(len, found))
    np.testing.assert_array_equal(packed.tokens[packed.segments == 0], PAD)
    for row in packed.segments.reshape(-1, sizes["row_length"]):
        real = row[row > 0]
        assert (row[len(real) :] == 0).all()
        assert (np.diff(real, prepend=0) >= 0).all()
        assert (np.diff(real, prepend=0) <= 1).all()


@settings(max_examples=50, deadline=None)
@given(groups())
def test_a_group_depends_on_its_own_captions_alone(example):
    ids, sizes = example
    together = pack_captions(ids, **sizes)
    size = sizes["group_size"]
    for number, first in enumerate(range(0, len(ids), size)):
        alone = pack_captions(ids[first : first + size], **sizes)
        for name in ("tokens", "segments", "eot"):
            np.testing.assert_array_equal(getattr(together, name)[number], getattr(alone, name)[0])


@settings(max_examples=100, deadline=None)
@given(groups())
def test_captions_are_cut_only_where_they_do_not_fit(example):
    ids, sizes = example
    lengths = [len(caption) for caption in ids[: sizes["group_size"]]]
    layout = lay_out(lengths, sizes["rows"], sizes["row_length"])
    cut = [i for i, kept in enumerate(layout.kept) if kept < lengths[i]]
    whole = lay_out(lengths, sizes["group_size"], sizes["row_length"])
    assert whole.kept == lengths  # a caption to a row always fits
    assert bool(cut) == (max(whole.rows) >= sizes["rows"])
    # The longest of a row alone lose tokens, as few as it takes.
    for i in cut:
        others = [k for k, r in zip(layout.kept, layout.rows, strict=True) if r == layout.rows[i]]
        assert max(others) <= layout.kept[i] + 1
        assert sum(others) == sizes["row_length"]


def test_the_rule_never_changes():
    """Golden: a run that was started yesterday goes on with the same rows."""
    layout = lay_out([3, 7, 5, 2, 8, 3], rows=4, row_length=8)
    assert layout.kept == [3, 7, 5, 2, 8, 3]
    assert layout.rows == [2, 1, 2, 3, 0, 3]
    assert layout.starts == [5, 0, 0, 3, 0, 0]
    assert layout.segments == [2, 1, 1, 2, 1, 1]
    # 29 tokens into 27 places: the last caption finds none, and 8 makes room for it.
    layout = lay_out([3, 7, 5, 2, 8, 4], rows=3, row_length=9)
    assert layout.kept == [3, 7, 5, 2, 6, 4]
    assert layout.rows == [0, 1, 2, 1, 0, 2]


def test_fewest_rows_hold_the_shortest():
    for group_size in range(1, 40):
        for row_length in range(SHORTEST, 12):
            rows = fewest_rows(group_size, row_length)
            kept = lay_out([row_length] * group_size, rows, row_length).kept
            assert min(kept) >= SHORTEST


def web_lengths(num, seed):
    words = np.random.default_rng(seed).lognormal(2.5, 0.7, num)
    return np.clip(2 + np.round(words), SHORTEST, 77).astype(int)


@pytest.mark.parametrize(("group_size", "expected"), [(16, 7), (64, 20)])
def test_chosen_rows_cut_few_of_other_captions(group_size, expected):
    rows = choose_rows(web_lengths(8192, seed=0), group_size, 77)
    assert rows == expected
    fresh = web_lengths(2**16, seed=1).reshape(-1, group_size).tolist()

    def share_cut(rows):
        kept = [lay_out(group, rows, 77).kept for group in fresh]
        return (np.array(kept) < np.array(fresh)).mean()

    assert share_cut(rows) <= 1e-4 < share_cut(rows - 2)  # neither too few nor many too many


def test_chosen_rows_of_captions_that_fill_theirs():
    assert choose_rows(np.full(100, 500), 8, 77) == 8  # cut at 77, as without packing
    assert choose_rows(np.full(100, 38), 8, 77) == 4
    # Of others than were measured there would be room for none.
    assert choose_rows(np.full(100, 2), 64, 8) == fewest_rows(64, 8) == 32


class Captions:
    """A source of captions; every seventh sample is bad."""

    def __init__(self, *texts):
        self._texts = texts

    def __len__(self):
        return 70

    def captions(self, row):
        if row % 7 == 0:
            raise ValueError("no caption")
        return self._texts


def test_measured_lengths_are_those_of_the_mixture():
    tokenizer = Tokenizer.clip()
    sources = {"short": Captions("cat"), "two": Captions("a cat", "cat cat cat cat")}
    config = DataConfig(
        sources={
            "short": SourceConfig(path="-", weight=3.0),
            "two": SourceConfig(path="-", weight=1.0, caption_weights=(1.0, 3.0)),
        }
    )
    lengths = measure_lengths(config, sources, tokenizer, context_length=5, num_captions=700)
    again = measure_lengths(config, sources, tokenizer, context_length=5, num_captions=700)
    np.testing.assert_array_equal(lengths, again)
    assert len(lengths) == pytest.approx(600, abs=10)
    share = {length: (lengths == length).mean() for length in (3, 4, 5)}
    assert share[3] == pytest.approx(0.75, abs=0.02)
    assert share[4] == pytest.approx(0.0625, abs=0.03)
    assert share[5] == pytest.approx(0.1875, abs=0.04)  # of 6 tokens, cut
    first = dataclasses.replace(config.sources["two"], captions="first", caption_weights=())
    config = dataclasses.replace(config, sources=config.sources | {"two": first})
    assert measure_lengths(config, sources, tokenizer, context_length=5).max() == 4


@pytest.fixture
def streamed(tmp_path):
    """Makes a source: two tars of samples of so many bytes, the first with so many words, 1, 2, ...

    more up to `others`, and again.
    """

    def make(name, num_samples, num_bytes, num_words, *, others=1):
        for tar in range(2):
            members = []
            for number in range(num_samples):
                words = num_words + number % (others + 1)
                members.append((f"{number:04d}.jpg", bytes(num_bytes)))
                members.append((f"{number:04d}.txt", b" ".join([b"cat"] * words)))
            write_tar(tmp_path / name / f"{tar}.tar", members)
        return SourceConfig(path=f"{tmp_path}/{name}/*.tar", access="stream")

    return make


def streamed_lengths(num_captions, **sources):
    config = DataConfig(sources=sources, stream=StreamConfig(num_streams=2, interleave=1))
    return measure_streamed_lengths(
        config, Tokenizer.clip(), context_length=77, num_captions=num_captions
    )


def test_streamed_lengths_are_those_of_the_mixture_whatever_pictures_weigh(streamed):
    """80 samples of each stream are 19 MB of the one source, read in parts, 80 kB of the other."""
    large, small = streamed("large", 90, 240_000, 30), streamed("small", 130, 1_000, 3)
    lengths = streamed_lengths(320, large=large, small=small)
    assert len(lengths) == 320
    assert (lengths > 20).sum() == 160
    assert (lengths == 32).sum() == pytest.approx(80, abs=5)
    heavier = dataclasses.replace(small, weight=3.0)
    assert (streamed_lengths(320, large=large, small=heavier) > 20).sum() == 80


def test_large_pictures_are_not_all_read_and_small_sources_are_again(streamed):
    """Of 1 MiB, each stream reads 5 MiB for its 20 captions, to the end of a part: six samples."""
    large = streamed("large", 12, 2**20, 30, others=11)
    small, few = streamed("small", 60, 1_000, 3), streamed("few", 4, 1_000, 10, others=3)
    lengths = streamed_lengths(120, large=large, small=small, few=few)
    assert set(lengths[lengths >= 30]) == set(range(32, 38))
    assert [(lengths // 10 == tens).sum() for tens in (3, 0, 1)] == [40, 40, 40]
    alone = streamed_lengths(120, few=few)
    np.testing.assert_array_equal(np.unique(alone, return_counts=True), [range(12, 16), [16] * 4])


def test_a_mixture_without_captions_is_told():
    source = Captions()
    config = DataConfig(sources={"empty": SourceConfig(path="-")})
    with pytest.raises(UserError, match="none of 20 samples of empty has a caption"):
        measure_lengths(
            config, {"empty": source}, Tokenizer.clip(), context_length=8, num_captions=20
        )
