"""Turn a path with braces, globs and commas into a list of files."""

import glob
import os
import re

from clip_jax.config.errors import UserError

_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_path(path: str) -> list[str]:
    """Expand comma-separated patterns to files: in the order written, the matches of a glob sorted.

    `{000..131}` counts with zero padding, `{train,extra}` lists, braces nest.

    Raises UserError if nothing is named, a file is missing or a glob matches none.
    """
    files: list[str] = []
    missing: list[str] = []
    for pattern in filter(None, map(str.strip, _split_commas(path))):
        if "://" in pattern or pattern.startswith("pipe:"):
            raise UserError(
                f"{pattern}: only local files can be read; mount the bucket or copy the tars"
            )
        for name in _expand_braces(os.path.expanduser(pattern)):
            # A file whose name has brackets is itself before it is a pattern.
            found = [name] if os.path.isfile(name) else sorted(glob.glob(name, recursive=True))
            files.extend(found)
            if not found:
                missing.append(name)
    if missing:
        total = len(files) + len(missing)
        raise UserError(
            f"{len(missing)} of {total} tar files named by '{path}' do not exist, "
            f"the first: {os.path.abspath(missing[0])}; check the path and the brace range"
        )
    if not files:
        raise UserError("the path of a webdataset source is empty; name at least one tar file")
    return files


def _split_commas(text: str) -> list[str]:
    """Split at the commas outside braces."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _expand_braces(pattern: str) -> list[str]:
    start = pattern.find("{")
    depth = 0
    for end in range(max(start, 0), len(pattern)):
        depth += (pattern[end] == "{") - (pattern[end] == "}")
        if start >= 0 and depth == 0:
            break
    else:
        return [pattern]  # no braces, or an unmatched one: part of the name
    inside = pattern[start + 1 : end]
    span = _RANGE.fullmatch(inside)
    if span:
        first, last = int(span[1]), int(span[2])
        padded = span[1].startswith("0") or span[2].startswith("0")
        width = max(len(span[1]), len(span[2])) if padded else 0
        step = 1 if first <= last else -1
        choices = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    else:
        choices = [name for part in _split_commas(inside) for name in _expand_braces(part)]
    endings = _expand_braces(pattern[end + 1 :])
    return [pattern[:start] + choice + ending for choice in choices for ending in endings]
