"""Dataclasses to and from ml_collections.ConfigDict and JSON, with errors a user can act on."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from clip_jax.config.errors import ConfigError
from clip_jax.config.schema import ExperimentConfig


def to_config_dict(config: Any) -> ConfigDict:
    """A ConfigDict with the fields of a dataclass; fields that are None keep their type."""
    result = ConfigDict()
    for name, hint in _fields(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            result[name] = to_config_dict(value)
        elif isinstance(value, dict):
            entries = {k: to_config_dict(v) for k, v in value.items()}
            result[name] = ConfigDict(entries)
        elif value is None:
            kind = _without_none(hint)
            result[name] = config_dict.placeholder(typing.get_origin(kind) or kind)
        else:
            result[name] = value
    return result


def from_config_dict(config: Mapping[str, Any] | ConfigDict) -> ExperimentConfig:
    """The typed config. Raises ConfigError for an unknown key or a value of the wrong type."""
    return _build(ExperimentConfig, config, "")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dicts, tuples as lists: what `config.json` holds."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_json(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def load_json(path: Path | str) -> ExperimentConfig:
    """The config saved in a local workdir. Raises ConfigError, which names the file."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    return parse_json(content, str(path))


def parse_json(content: bytes, path: str) -> ExperimentConfig:
    """The config in what was read from `path`. Raises ConfigError, which names it."""
    try:
        values = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at {error.start}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} must hold a JSON object of settings, as clip-jax config prints; it holds a "
            f"{type(values).__name__}"
        )
    try:
        return from_config_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{'model.image.width': 768, ...}`: one entry for each leaf."""
    flat: dict[str, Any] = {}
    items = config.items() if isinstance(config, dict) else _shallow(config)
    for name, value in items:
        path = f"{prefix}{name}"
        if dataclasses.is_dataclass(value) or (isinstance(value, dict) and value):
            flat |= flatten(value, path + ".")
        else:
            flat[path] = value
    return flat


def _shallow(config: Any) -> list[tuple[str, Any]]:
    return [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]


def _fields(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    return hint


def _build(cls: Any, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping | ConfigDict):
        raise ConfigError(f"config.{path.rstrip('.')} must be a group of fields, got {values!r}")
    hints = _fields(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(unknown_key(f"{path}{key}", [f"{path}{name}" for name in hints]))
    return cls(**{k: _convert(hints[k], values[k], f"{path}{k}") for k in values})


def unknown_key(path: str, known: list[str]) -> str:
    """The message for a config key that does not exist, with the nearest one that does."""
    nearest = difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    if not nearest:
        # The right name in the wrong group is the commonest slip after misspelling.
        every = list(flatten(ExperimentConfig()))
        leaf = path.rsplit(".", 1)[-1]
        nearest = [k for k in every if k.rsplit(".", 1)[-1] == leaf]
        nearest = nearest or difflib.get_close_matches(path, every, n=1, cutoff=0.3)
    hint = f"; did you mean config.{nearest[0]}?" if nearest else ""
    return f"unknown config key config.{path}{hint}"


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type `hint`, or ConfigError. Lists become tuples, ints become floats."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ConfigError(f"config.{path} must be {_spell(hint)}, got {value!r}")
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(_without_none(hint), value, path)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path + ".")
    if origin is dict:
        if not isinstance(value, Mapping | ConfigDict):
            raise wrong
        if dotted := [k for k in value if "." in k]:
            raise ConfigError(f"config.{path} has an entry {dotted[0]!r}: leave the dot out")
        return {k: _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise wrong
        element_hints = [args[0]] * len(value) if args[-1] is ... else list(args)
        if len(element_hints) != len(value):
            raise wrong
        pairs = zip(element_hints, value, strict=True)
        return tuple(_convert(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(pairs))
    if origin is typing.Literal:
        if value not in args:
            near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
            extra = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{wrong}{extra}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise wrong
    return value


def _spell(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin is tuple:
        if args[-1] is ...:
            return f"a tuple of {_spell(args[0])}"
        return f"a tuple of {len(args)} {_spell(args[0])}s"
    if origin is dict:
        return "a group of named entries"
    return {int: "int", float: "float", bool: "bool", str: "string"}.get(hint, str(hint))
