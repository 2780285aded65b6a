import pytest
from data.nasty import NASTY, TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import open_clip_or_skip

from clip_jax.data.cleaning import _mended, clean, encodable


@pytest.mark.parametrize(
    ("cleaning", "lowercase", "expected"),
    [
        ("none", False, " It\u2019s_A &amp;amp; \u03a3\u0391\u03a3 "),
        ("none", True, " it\u2019s_a &amp;amp; \u03c3\u03b1\u03c3 "),
        ("whitespace", False, "It's_A & \u03a3\u0391\u03a3"),
        ("whitespace", True, "it's_a & \u03c3\u03b1\u03c2"),
        ("canonicalize", True, "its a \u03c3\u03b1\u03c2"),
        ("siglip", True, "it\u2019sa ampamp \u03c3\u03b1\u03c2"),
        ("siglip", False, "It\u2019sA ampamp \u03a3\u0391\u03a3"),
    ],
)
def test_what_each_does(cleaning, lowercase, expected):
    text = " It\u2019s_A &amp;amp; \u03a3\u0391\u03a3 "
    assert clean(text, cleaning, lowercase=lowercase) == expected


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(
        st.one_of(
            st.characters(max_codepoint=127),
            st.sampled_from(["&lt;", "&amp", "&#9;", "\x0b", "\x1b[1m", "\r\n"]),
        ),
        max_size=20,
    ).map("".join)
)
def test_plain_ascii_needs_no_mending(text):
    """The way round ftfy is one that changes nothing."""
    mended = " ".join(_mended(text).split())
    assert clean(text, "whitespace", lowercase=False) == mended


@pytest.mark.parametrize(
    ("theirs", "cleaning", "lowercase"),
    [
        ("lower", "whitespace", True),
        ("whitespace", "whitespace", False),
        ("canonicalize", "canonicalize", True),
    ],
)
def test_open_clip_cleans_like_this(theirs, cleaning, lowercase):
    open_clip = open_clip_or_skip()
    reference = open_clip.tokenizer.get_clean_fn(theirs)

    @settings(max_examples=300, deadline=None)
    @given(text=TEXTS)
    def check(text):
        assert clean(text, cleaning, lowercase=lowercase) == reference(text)

    check()
    for text in NASTY:
        assert clean(text, cleaning, lowercase=lowercase) == reference(text)


def test_half_a_pair_of_surrogates():
    assert encodable("half \ud83d pair \U0001f600") == "half ? pair \U0001f600"
