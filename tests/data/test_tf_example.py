import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from clip_jax.data.sources.tf_example import read_example

VALUES = st.one_of(
    st.lists(st.binary(max_size=200), max_size=3),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3),
)


def serialised(features: dict[str, list[bytes] | list[int] | list[float]]) -> bytes:
    """By protobuf, with tfds' copy of TensorFlow's messages."""
    messages = {}
    for name, values in features.items():
        if values and isinstance(values[0], int):
            message = tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=values))
        elif values and isinstance(values[0], float):
            message = tf_feature_pb2.Feature(float_list=tf_feature_pb2.FloatList(value=values))
        else:
            message = tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=values))
        messages[name] = message
    features_message = tf_feature_pb2.Features(feature=messages)
    return tf_example_pb2.Example(features=features_message).SerializeToString()


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=20), VALUES, max_size=4))
def test_equals_protobuf(features):
    assert read_example(serialised(features)) == features


def test_only_what_is_asked_for():
    data = serialised({"image": [b"x" * 300], "größe": [-7, 2**62], "score": [0.5]})
    assert read_example(data, ["größe", "nothing"]) == {"größe": [-7, 2**62]}
    assert set(read_example(data)) == {"image", "größe"}  # floats are of no use here


def test_integers_that_are_not_packed():
    # Old writers: field 1 of Int64List as a varint each.
    numbers = b"\x08\x05\x08\x07"
    feature = b"\x1a" + bytes([len(numbers)]) + numbers
    entry = b"\x0a\x01n\x12" + bytes([len(feature)]) + feature
    features = b"\x0a" + bytes([len(entry)]) + entry
    data = b"\x0a" + bytes([len(features)]) + features
    assert tf_example_pb2.Example.FromString(data).features.feature["n"].int64_list.value == [5, 7]
    assert read_example(data) == {"n": [5, 7]}


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_is_a_value_error(data):
    message = bytearray(serialised({"image": [b"x" * 150], "n": [1, -1]}))
    for _ in range(data.draw(st.integers(0, 3))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    # Any other error is one that a run does not take for a bad sample.
    with contextlib.suppress(ValueError):
        found = read_example(bytes(message[: data.draw(st.integers(0, len(message)))]))
        assert all(isinstance(values, list) for values in found.values())


def test_cut_short():
    with pytest.raises(ValueError, match="cut short"):
        read_example(serialised({"image": [b"x" * 150]})[:-20])
