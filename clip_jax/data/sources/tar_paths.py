"""Turn a path with braces, globs and commas into a list of files."""

import glob
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError
from clip_jax.data.sources.files import (
    Files,
    is_remote,
    one_line,
    remote_filesystem,
    unreadable,
)
from clip_jax.data.sources.in_threads import in_threads

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_OTHER_KINDS = {
    **dict.fromkeys((".csv", ".tsv", ".jsonl"), "table"),
    **dict.fromkeys((".parquet", ".arrow"), "parquet"),
}
# Remote files whose existence is checked, evenly spread over the list: each costs a request.
_NUM_CHECKED = 16


def expand_path(path: str, known: Callable[[str], bool] = lambda file: False) -> list[str]:
    """Expand comma-separated patterns to files: in the order written, the matches of a glob sorted.

    `{000..131}` counts with zero padding, `{train,extra}` lists, braces nest. URLs expand in the
    same way. A local file must exist; of remote ones that no glob has found, 16 are looked up, the
    first and the last among them. known: whether a file is to be listed though it is gone, which is
    asked of local files that do not exist and of the remote ones to look up.

    Raises UserError if nothing is named, a file is missing or a folder, a glob matches none or a
    store does not answer.
    """
    files: list[str] = []
    missing: list[str] = []
    unseen: list[str] = []  # remote
    for pattern in filter(None, map(str.strip, _split_commas(path))):
        if pattern.startswith("pipe:"):
            raise UserError(f"{pattern}: commands are not run; name the file or its URL")
        remote = is_remote(pattern)
        names = _expand_braces(pattern if remote else os.path.expanduser(pattern))
        there = [False] * len(names) if remote else in_threads(os.path.isfile, names)
        for name, is_there in zip(names, there, strict=True):
            if not remote:
                # A file whose name has brackets is itself before it is a pattern.
                found = [name] if is_there else sorted(glob.glob(name, recursive=True))
                found = found or [name] * known(name)
                if found in ([name], [name.rstrip("/")]) and os.path.isdir(name):
                    folder = name.rstrip("/")
                    raise UserError(
                        f"{name} is a folder: name the files in it, as in '{folder}/*.tar'"
                    )
            elif _is_glob(name):
                found = _remote_glob(name)
            else:
                found = [name]
                unseen.append(name)
            files.extend(found)
            if not found:
                missing.append(name)
    total = len(files) + len(missing)
    if not missing:
        missing = _missing_remote(unseen, known)
    if missing:
        first = missing[0] if is_remote(missing[0]) else os.path.abspath(missing[0])
        raise UserError(
            f"{len(missing)} of {total} files named by '{path}' do not exist, "
            f"the first: {first}; check the path and the brace range"
        )
    if not files:
        raise UserError("the path of a source is empty; name at least one file")
    return files


def expand_tars(path: str, known: Callable[[str], bool] = lambda file: False) -> list[str]:
    """`expand_path` of tars. Raises UserError too where a name is that of another kind of file."""
    files = expand_path(path, known)
    for file in files:
        suffix = os.path.splitext(file)[1].lower()
        kind = _OTHER_KINDS.get(suffix)
        if kind is not None:
            raise UserError(
                f"{file} is no tar: {suffix} files are read with kind='{kind}' (clip-jax data "
                f"check: --kind={kind})"
            )
    return files


def _is_glob(url: str) -> bool:
    characters = "*[" if url.startswith("http") else "*?["  # in https, ? begins a query
    return any(character in url for character in characters)


def _remote_glob(url: str) -> list[str]:
    filesystem = remote_filesystem(url)
    try:
        names = sorted(filesystem.glob(url))
        if not names:  # a glob keeps quiet about a store that does not answer
            folder = re.split(r"[*?\[]", url, maxsplit=1)[0].rpartition("/")[0]
            filesystem.ls(folder)
    except FileNotFoundError:
        return []
    except Exception as error:  # each store has its own tree of errors
        raise UserError(f"{url} cannot be listed: {one_line(error)}") from error
    return [filesystem.unstrip_protocol(name) for name in names]


def _missing_remote(urls: Sequence[str], known: Callable[[str], bool]) -> list[str]:
    """Those of a few remote files that are not there and not known."""
    last = len(urls) - 1
    places = {round(step * last / (_NUM_CHECKED - 1)) for step in range(_NUM_CHECKED)}
    checked = [urls[place] for place in sorted(places) if urls and not known(urls[place])]
    files = Files(checked)

    def is_missing(number: int) -> bool:
        try:
            files.info(number)
        except BadSampleError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return True
            raise unreadable(checked[number], error) from None
        return False

    with ThreadPoolExecutor(_NUM_CHECKED) as pool:
        missing = list(pool.map(is_missing, range(len(checked))))
    return [url for url, gone in zip(checked, missing, strict=True) if gone]


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
