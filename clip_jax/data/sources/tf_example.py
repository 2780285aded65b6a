"""Reads serialised tf.Example messages: maps of names to lists of bytes, integers or floats.

The protobuf encoding is https://protobuf.dev/programming-guides/encoding. A reader of our own
takes out the features that are asked for and needs neither TensorFlow nor the half second that
importing tensorflow_datasets costs every worker.
"""

from collections.abc import Collection, Iterator

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5  # wire types
_MAX_VARINT_BYTES = 10


def read_example(
    data: bytes, names: Collection[str] | None = None
) -> dict[str, list[bytes] | list[int]]:
    """Return the features of a tf.Example that are bytes or integers; with `names`, those alone.

    Raises ValueError where `data` is no such message or is damaged.
    """
    found: dict[str, list[bytes] | list[int]] = {}
    for number, start, end in _messages(data, 0, len(data)):
        if number != 1:
            continue
        for entry, entry_start, entry_end in _messages(data, start, end):
            if entry == 1:
                _read_entry(data, entry_start, entry_end, names, found)
    return found


def _read_entry(
    data: bytes,
    start: int,
    end: int,
    names: Collection[str] | None,
    found: dict[str, list[bytes] | list[int]],
) -> None:
    """One entry of the map of features: its name and its list."""
    name, value = "", (0, 0)
    for number, field_start, field_end in _messages(data, start, end):
        if number == 1:
            name = data[field_start:field_end].decode("utf-8", errors="replace")
        elif number == 2:
            value = (field_start, field_end)
    if names is not None and name not in names:
        return
    for kind, list_start, list_end in _messages(data, *value):
        if kind == 1:
            found[name] = [
                data[first:last] for _, first, last in _messages(data, list_start, list_end)
            ]
        elif kind == 3:
            found[name] = list(_integers(data, list_start, list_end))


def _integers(data: bytes, start: int, end: int) -> Iterator[int]:
    """The values of an Int64List, packed or one by one."""
    for wire_type, first, last in _fields(data, start, end):
        if wire_type == _LENGTH_DELIMITED:
            position = first
            while position < last:
                value, position = _varint(data, position, last)
                yield _signed(value)
        elif wire_type == _VARINT:
            yield _signed(_varint(data, first, last)[0])


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _messages(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each length-delimited field in data[start:end]."""
    for key, first, last in _keyed_fields(data, start, end):
        if key & 7 == _LENGTH_DELIMITED:
            yield key >> 3, first, last


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Wire type, start and end of each field with number 1 in data[start:end]."""
    for key, first, last in _keyed_fields(data, start, end):
        if key >> 3 == 1:
            yield key & 7, first, last


def _keyed_fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    position = start
    while position < end:
        key, position = _varint(data, position, end)
        wire_type = key & 7
        if wire_type == _LENGTH_DELIMITED:
            length, position = _varint(data, position, end)
            last = position + length
        elif wire_type == _VARINT:
            _, last = _varint(data, position, end)
        elif wire_type == _FIXED64:
            last = position + 8
        elif wire_type == _FIXED32:
            last = position + 4
        else:
            raise ValueError(f"not a tf.Example: wire type {wire_type} at byte {position}")
        if last > end:
            raise ValueError(f"a damaged tf.Example: the field at byte {position} is cut short")
        yield key, position, last
        position = last


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """The integer at `position` and where it ends."""
    value = 0
    for count in range(_MAX_VARINT_BYTES):
        if position + count >= end:
            raise ValueError(f"a damaged tf.Example: the integer at byte {position} is cut short")
        byte = data[position + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value & (2**64 - 1), position + count + 1
    raise ValueError(f"not a tf.Example: an integer of more than 64 bits at byte {position}")
