import pytest
from data.nasty import NASTY
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError
from clip_jax.data.sources.caption_values import (
    captions_of_values,
    class_captions,
    find_column,
    nested_value,
)


@pytest.mark.parametrize(
    ("values", "weights", "captions", "probabilities"),
    [
        ([" a cat \n"], (), ("a cat",), ()),
        ([["a", "b", "a", " "]], (), ("a", "b"), ()),
        (["größe".encode(), None], (), ("größe",), ()),
        (["a", ["b", "c"]], (2, 2), ("a", "b", "c"), (0.5, 0.25, 0.25)),
        ([None, ["b", "c"]], (3, 1), ("b", "c"), (0.5, 0.5)),  # what is there shares it all
        (["a", "b"], (1, 0), ("a",), (1.0,)),
        (["a", ["a", "b"]], (1, 1), ("a", "b"), (0.75, 0.25)),
        ([["x", 7, None, b"\xff", ["y"]], 3], (), ("x", "y"), ()),
    ],
)
def test_captions(values, weights, captions, probabilities):
    found = captions_of_values(values, ["one", "two"][: len(values)], weights)
    assert found[0] == captions
    assert found[1] == pytest.approx(probabilities)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "no caption in key"),
        (b"ab\xff", r"not UTF-8 \(byte 2\)"),
        ("\ud800", "surrogate"),
        ("x" * (2**20 + 1), "1048577 characters"),
        ({"a": 1}, "no caption in key"),
    ],
)
def test_no_caption(value, message):
    with pytest.raises(BadSampleError, match=message) as caught:
        captions_of_values([value], ["key"])
    assert caught.value.reason == "caption"


def in_lists(value, depth):
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [2, 8])
def test_lists_in_lists(depth):
    fields = nested_value(in_lists({"b": "a cat"}, depth), "b")
    for value in (in_lists("a cat", depth), fields):
        assert captions_of_values([value], ["key"])[0] == ("a cat",)


@pytest.mark.parametrize("depth", [9, 100, 600, 900, 5000])
def test_lists_too_deep_are_no_captions(depth):
    """JSON of some of these depths parses where a function that calls itself would fail."""
    deep = in_lists("a cat", depth)
    assert captions_of_values([[deep, "a dog"]], ["key"])[0] == ("a dog",)
    fields = nested_value(in_lists({"b": "a cat"}, depth), "b")
    for value, message in ((deep, "lists in lists, more than 8 deep"), (fields, "no caption")):
        with pytest.raises(BadSampleError, match=message) as caught:
            captions_of_values([value], ["key"])
        assert caught.value.reason == "caption"


def test_nasty_captions_stay_as_they_are():
    for text in NASTY:
        if text.strip():
            assert captions_of_values([text.encode()], ["key"])[0] == (text.strip(),)


json_values = st.recursive(
    st.none() | st.integers() | st.text(st.characters(), max_size=5) | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    ),
)


@given(
    st.lists(json_values, min_size=2, max_size=2), st.sampled_from(["a", "a.b", "b.a.a", "", "."])
)
def test_whatever_the_values_are(values, key):
    try:
        captions, weights = captions_of_values(
            [nested_value(value, key) for value in values], ["one", "two"], (1, 2)
        )
    except BadSampleError:
        return
    assert all(caption == caption.strip() != "" for caption in captions)
    assert sum(weights) == pytest.approx(1)


def test_nested_values():
    value = {"a": {"b": 1}, "a.b": 2, "c": [{"b": 3}, {"b": 4}, 5], "d": {"e.f": 6}}
    assert nested_value(value, "a.b") == 2
    assert nested_value(value, "a") == {"b": 1}
    assert nested_value(value, "c.b") == [3, 4, None]
    assert nested_value(value, "d.e.f") == 6
    assert nested_value(value, "x.y") is None


def test_classes():
    templates = ("a {}", "{} and {}", "a {}")
    assert class_captions("tabby_cat ", templates) == ("a tabby cat", "tabby cat and tabby cat")


def test_columns():
    def find(wanted, columns):
        return find_column(wanted, ("a", "b"), columns, path="p", setting="image_key")

    assert find("", ["b", "x", "a"]) == "a"
    assert find("x.y", ["b", "x"]) == "x.y"
    with pytest.raises(UserError, match=r"^p: no column 'y' \(image_key\); there are: b, x$"):
        find("y", ["b", "x"])
    with pytest.raises(UserError, match=r"none of the usual columns a, b; there are: 0, .*\.\.\.;"):
        find("", [str(number) for number in range(50)])
