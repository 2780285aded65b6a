"""What the first file of a source holds: members of a tar, columns of a table, features."""

import json
from collections import Counter
from contextlib import suppress
from typing import Any

from clip_jax.config.schema import SourceKind
from clip_jax.data.record import Source
from clip_jax.data.sources.array_record import open_reader
from clip_jax.data.sources.arrow_files import open_parts
from clip_jax.data.sources.files import Files
from clip_jax.data.sources.folder import FolderSource
from clip_jax.data.sources.tar_headers import Member, TarError, walk
from clip_jax.data.sources.tar_scan import split_name
from clip_jax.data.sources.tf_example import read_example

_HEAD = 8 * 2**20  # bytes: some hundred samples of a tar, in one request
_MOST_NAMES = 40


def describe_schema(kind: SourceKind, source: Source) -> list[str]:
    """A line or two about the file that holds the source's first sample."""
    try:
        return _describe(kind, source, source.shard(0))
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: of array_record
        return [f"the file of the first sample cannot be read: {error}"]


def _describe(kind: SourceKind, source: Source, file: str) -> list[str]:
    if isinstance(source, FolderSource):
        return ["captions from " + ("names of folders" if source.has_classes else ".txt files")]
    if kind in ("webdataset", "quickstart"):
        return _tar(file)
    if kind == "parquet":
        schema = open_parts(Files([file]), 0, file).schema
        return _names("columns", [f"{column.name} ({column.type})" for column in schema])
    if kind == "table":
        return _table(file)
    features = read_example(open_reader(file).read([0])[0])
    return _names("features", [f"{name} ({_kind(features[name])})" for name in sorted(features)])


def _tar(file: str) -> list[str]:
    head = Files([file]).read(0, 0, _HEAD)
    named: list[tuple[str, Member]] = []
    with suppress(TarError):  # where the head ends, or damage begins, which the index has told of
        for member in walk(lambda num_bytes, at: head[at : at + num_bytes], len(head)):
            if parts := split_name(member.name):
                named.append((parts[1].decode(errors="replace"), member))
    kinds = Counter(extension for extension, _ in named)
    counts = [f"{extension} {count:,}" for extension, count in kinds.most_common()]
    lines = _names(f"members of the first {len(named):,}", counts)
    for extension, member in named:
        if extension == "json":
            content = _object(head[member.data : member.data + member.size])
            return lines + _names("fields of the first json", list(content))
    return lines


def _table(file: str) -> list[str]:
    first = Files([file]).read(0, 0, _HEAD).lstrip(b"\xef\xbb\xbf\r\n").split(b"\n", 1)[0]
    if file.lower().endswith((".jsonl", ".ndjson", ".json")):
        return _names("fields of the first row", list(_object(first)))
    delimiter = "\t" if b"\t" in first else ","
    return _names("columns", first.decode(errors="replace").strip().split(delimiter))


def _object(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _kind(values: list[bytes] | list[int]) -> str:
    what = "bytes" if values and isinstance(values[0], bytes) else "integers"
    return what if len(values) == 1 else f"{len(values)} {what}"


def _names(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return [f"{what}: {', '.join(names[:_MOST_NAMES])}{more}"] if names else []
