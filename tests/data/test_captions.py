import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data.record import BadSampleError
from clip_jax.data.sources.captions import captions_of


def as_json(**fields):
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("text", "content", "expected"),
    [
        (b" a cat \n", None, ("a cat",)),
        (None, {"caption": "a cat"}, ("a cat",)),
        (None, {"captions": ["a", "b", "a", " "], "caption": "c"}, ("a", "b")),
        (b"a", {"captions": ["b", "a"]}, ("a",)),
        (b"", {"caption": "instead"}, ("instead",)),
        (b"\xff", {"caption": "instead"}, ("instead",)),
        (b"a\nb", None, ("a\nb",)),
        ("größer".encode(), {"caption": None}, ("größer",)),
        ("\ufeffbyte order mark".encode(), None, ("byte order mark",)),
    ],
)
def test_usual_captions(text, content, expected):
    assert captions_of(text, content and as_json(**content)) == (expected, ())


@pytest.mark.parametrize(
    ("text", "content", "keys", "message"),
    [
        (b" ", None, (), "no caption in txt, json 'caption' or 'captions'$"),
        (None, b"{broken", (), "the json does not parse: Expecting"),
        (None, b"\xff\xff{", (), "the json does not parse"),
        (None, b"[" * 100_000, (), "the json does not parse: maximum recursion depth"),
        (None, b'["a"]', (), "the json is not an object"),
        (None, b'{"caption": 7, "captions": null}', (), "no caption"),
        (None, b'{"captions": [1, "", null]}', (), "no caption"),
        ("ü".encode("latin-1"), None, (), r"the txt is not UTF-8 \(byte 0\)"),
        (b"a" * 2**20 + b"b", None, (), "has 1048577 characters"),
        (b"a" * (2**22 + 1), None, (), "the txt has 4194305 bytes"),
        (None, rb'{"caption": "\ud800"}', (), "half a surrogate pair"),
        (b"unused", b'{"caption": "unused"}', ("alt",), "no caption in alt$"),
        (None, b"{broken", ("txt",), "no caption in txt$"),  # it is not parsed
    ],
)
def test_no_caption(text, content, keys, message):
    with pytest.raises(BadSampleError, match=message) as caught:
        captions_of(text, content, keys)
    assert caught.value.reason == "caption"
    assert "\n" not in str(caught.value)


def test_keys_in_their_order():
    content = as_json(alt="an alt text", short=["one", "two", "one"], caption="not wanted")
    assert captions_of(b"txt", content, ("short", "alt", "txt")) == (
        ("one", "two", "an alt text", "txt"),
        (),
    )


@pytest.mark.parametrize("keys", [(), ("caption",)])
@pytest.mark.parametrize("depth", [2, 100, 600, 900, 5000])
def test_lists_in_lists(depth, keys):
    content = b'{"caption": ' + b"[" * depth + b'"a cat"' + b"]" * depth + b"}"
    if depth == 2:
        assert captions_of(None, content, keys)[0] == ("a cat",)
        return
    with pytest.raises(BadSampleError, match=r"lists in lists|does not parse") as caught:
        captions_of(None, content, keys)
    assert caught.value.reason == "caption"


def test_weights_are_shared():
    content = as_json(alt="alt", synthetic=["a", "b", "", "alt"])
    captions, weights = captions_of(b"raw", content, ("txt", "alt", "synthetic"), (2, 1, 3))
    assert captions == ("raw", "alt", "a", "b")
    # 'synthetic' has 3 of 6 for three captions; what two keys hold gets both their shares.
    assert weights == pytest.approx((2 / 6, 1 / 6 + 1 / 6, 1 / 6, 1 / 6))


def test_weights_of_what_is_lacking_go_to_the_rest():
    captions, weights = captions_of(None, as_json(alt="x"), ("txt", "alt", "more"), (8, 1, 1))
    assert (captions, weights) == (("x",), (1.0,))
    captions, weights = captions_of(b"t", as_json(more="m"), ("txt", "alt", "more"), (3, 5, 1))
    assert captions == ("t", "m")
    assert weights == pytest.approx((0.75, 0.25))


def test_a_key_without_weight_is_never_drawn():
    assert captions_of(b"t", as_json(a="x"), ("txt", "a"), (1, 0)) == (("t",), (1.0,))
    with pytest.raises(BadSampleError, match="no caption"):
        captions_of(b"t", None, ("txt",), (0,))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=5,
)
members = st.one_of(
    st.none(),
    st.binary(max_size=40),
    st.text(max_size=20).map(lambda text: text.encode("utf-16")),
    st.dictionaries(st.sampled_from(["caption", "captions", "alt"]), values, max_size=3).map(
        lambda fields: json.dumps(fields).encode()
    ),
)


@settings(max_examples=300, deadline=None)
@given(
    text=members,
    content=members,
    choice=st.sampled_from([((), ()), (("alt", "txt"), ()), (("txt", "captions"), (1.0, 2.0))]),
)
def test_any_bytes_give_captions_or_a_bad_sample(text, content, choice):
    try:
        captions, weights = captions_of(text, content, *choice)
    except BadSampleError as error:
        problem = error.reason
    else:
        problem = None
        check(captions, weights, choice[1])
    assert problem in (None, "caption")


def check(captions, given, weights):
    assert captions
    assert len(set(captions)) == len(captions)
    for caption in captions:
        assert caption.strip() == caption != ""
        caption.encode()
    assert len(given) == (len(captions) if weights else 0)
    assert not given or sum(given) == pytest.approx(1)
