"""Captions out of a sample's `txt` and `json` members."""

import json
from collections.abc import Sequence
from typing import Any

from clip_jax.data.sources.caption_values import MAX_CAPTION, Captions, captions_of_values

_USUAL = "txt, json 'caption' or 'captions'"


def captions_of(
    text: bytes | None,
    content: bytes | None,
    keys: Sequence[str] = (),
    weights: Sequence[float] = (),
) -> Captions:
    """Return a sample's captions, each once, and their probabilities: () where `weights` is.

    text: the `txt` member: one caption. content: the `json` member, an object. None: there is none.
    keys: fields of the json, each a string or a list of strings, or 'txt' for the `txt` member. ():
    the `txt`; where that has no caption, the json's `captions` (a list), or else its `caption`.
    weights: of the keys, in any unit. A list shares its key's weight evenly; what a sample lacks is
    shared by the rest.

    Whitespace around captions is taken off. Empty captions, those of more than 2**20 characters
    and what is not UTF-8 (as peers, which read it strictly) or not text do not count.

    Raises BadSampleError("caption") if none is left.
    """
    problems: list[str] = []
    if keys:
        by_key: dict[str, object] = {}
        if content is not None and any(key != "txt" for key in keys):
            by_key = _object(content, problems)
        by_key = by_key | {"txt": _decoded(text, problems)}
        return captions_of_values([by_key.get(key) for key in keys], keys, weights, problems)
    if caption := _decoded(text, problems):
        return (caption,), ()
    fields = {} if content is None else _object(content, problems)
    listed = fields.get("captions")
    value = listed if isinstance(listed, list) else fields.get("caption")
    return captions_of_values([value], [_USUAL], (), problems)


def _decoded(text: bytes | None, problems: list[str]) -> str:
    """The caption in a `txt` member, '' where there is none."""
    if text is None:
        return ""
    if len(text) > 4 * MAX_CAPTION:
        problems.append(f"the txt has {len(text)} bytes")
        return ""
    try:
        caption = text.decode("utf-8-sig" if text[:1] == b"\xef" else "utf-8").strip()
    except UnicodeDecodeError as error:
        problems.append(f"the txt is not UTF-8 (byte {error.start})")
        return ""
    if len(caption) > MAX_CAPTION:
        problems.append(f"a caption has {len(caption)} characters")
        return ""
    return caption


def _object(content: bytes, problems: list[str]) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError: UnicodeDecodeError too
        problems.append(f"the json does not parse: {' '.join(str(error).split())[:200]}")
        return {}
    if not isinstance(fields, dict):
        problems.append("the json is not an object")
        return {}
    return fields
