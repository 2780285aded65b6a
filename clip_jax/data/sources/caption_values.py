"""Captions out of values that are already read: of columns, fields and features."""

import time
from collections.abc import Callable, Mapping, Sequence

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError, Source

# Characters. What is longer is no caption but a value gone astray, and would hold up the tokenizer.
MAX_CAPTION = 2**20
# Lists in lists. What lies deeper is no caption either, and ends at Python's depth of calls.
_MAX_DEPTH = 8
_CHECKED_SAMPLES = 100
_CHECK_SECONDS = 10.0  # where the storage is dead each sample takes some

Captions = tuple[tuple[str, ...], tuple[float, ...]]  # and their probabilities; (): not set


def captions_of_values(
    values: Sequence[object],
    keys: Sequence[str],
    weights: Sequence[float] = (),
    problems: Sequence[str] = (),
) -> Captions:
    """Return the captions among the values of `keys`, each once, and their probabilities.

    values: for each key, text (or its UTF-8 bytes), a list of it, or None where there is none.
    weights: of the keys, in any unit; (): no probabilities. A list shares its key's weight evenly;
    what a sample lacks is shared by the rest. problems: what was wrong with values left out, for
    the message.

    Whitespace around captions is taken off. Empty captions, those of more than 2**20 characters
    and what is not UTF-8, not text or in more than 8 lists do not count.

    Raises BadSampleError("caption") if none is left.
    """
    problems = list(problems)
    found: dict[str, float] = {}
    for number, value in enumerate(values):
        weight = weights[number] if weights else 1.0
        usable = _texts(value, problems) if weight > 0 else []
        for caption in usable:
            found[caption] = found.get(caption, 0.0) + weight / len(usable)
    if not found:
        reasons = "".join(f"; {problem}" for problem in dict.fromkeys(problems))
        raise BadSampleError("caption", f"no caption in {', '.join(keys)}{reasons}")
    if not weights:
        return tuple(found), ()
    total = sum(found.values())
    return tuple(found), tuple(weight / total for weight in found.values())


def _texts(value: object, problems: list[str], depth: int = 0) -> list[str]:
    if isinstance(value, list | tuple):
        if depth == _MAX_DEPTH:
            problems.append(f"lists in lists, more than {_MAX_DEPTH} deep")
            return []
        return [text for item in value for text in _texts(item, problems, depth + 1)]
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            problems.append(f"a caption is not UTF-8 (byte {error.start})")
            return []
    if not isinstance(value, str) or not (caption := value.strip()):
        return []
    if len(caption) > MAX_CAPTION:
        problems.append(f"a caption has {len(caption)} characters")
        return []
    try:
        caption.isascii() or caption.encode()
    except UnicodeEncodeError:  # JSON can spell it (`\ud800`); no tokenizer can encode it
        problems.append("a caption has half a surrogate pair")
        return []
    return [caption]


def nested_value(value: object, key: str, depth: int = 0) -> object:
    """What `key` leads to in nested mappings, `captions.text` also where `captions` is a list.

    depth: of lists that `value` lies in; None beyond 8.
    """
    if isinstance(value, Mapping) and key in value:
        return value[key]
    name, dot, rest = key.partition(".")
    if isinstance(value, list | tuple):
        if depth == _MAX_DEPTH:
            return None
        return [nested_value(item, key, depth + 1) for item in value]
    if isinstance(value, Mapping) and dot:
        return nested_value(value.get(name), rest, depth)
    return None


def class_captions(name: str, templates: Sequence[str]) -> tuple[str, ...]:
    """Prompts for a class of a labelled set, its underscores as blanks."""
    words = " ".join(name.replace("_", " ").split())
    return tuple(dict.fromkeys(template.replace("{}", words) for template in templates))


def check_captions(source: Source, path: str) -> None:
    """Raises UserError where none of the first 100 samples has a caption."""
    if len(source) == 0:
        raise UserError(f"{path}: no sample in it")
    started, checked = time.monotonic(), 0
    while checked < min(len(source), _CHECKED_SAMPLES):
        try:
            source.captions(checked)
        except BadSampleError as error:
            problem = f"{source.locate(checked)}: {error}"
        else:
            return
        checked += 1
        if time.monotonic() - started > _CHECK_SECONDS:
            break
    raise UserError(
        f"{path}: none of the first {checked} samples has a caption; the last: {problem}"
    )


def find_column(
    wanted: str,
    usual: Sequence[str],
    columns: Sequence[str],
    *,
    path: str,
    setting: str,
    fits: Callable[[str], bool] = lambda _: True,
) -> str:
    """The column `wanted`, or where that is empty the first of the usual names that is there.

    Raises UserError with the columns that there are.
    """
    there = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "")
    if wanted:
        if wanted in columns or wanted.partition(".")[0] in columns:
            return wanted
        raise UserError(f"{path}: no column '{wanted}' ({setting}); there are: {there or 'none'}")
    for name in usual:
        if name in columns and fits(name):
            return name
    raise UserError(
        f"{path}: none of the usual columns {', '.join(usual)}; there are: {there or 'none'}; "
        f"name one with {setting}"
    )
