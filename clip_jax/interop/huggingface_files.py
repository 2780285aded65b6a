"""The files of a Hugging Face model directory: config.json and weights, whole or in shards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_jax.config import UserError
from clip_jax.interop.table import NdArray
from clip_jax.interop.tensors import read_tensors

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in order of preference


def read_json(path: Path) -> dict[str, Any]:
    """An object out of a JSON file. Raises UserError, which names it, where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, but it holds a {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_weights(directory: Path) -> dict[str, NdArray]:
    """All tensors of the directory by name, out of one file or of the shards that an index lists.

    Raises UserError where there are none, or a file is missing or damaged.
    """
    for name in _WEIGHTS:
        if (directory / name).is_file():
            return read_tensors(directory / name)
        index = directory / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index)
    raise UserError(f"{directory} has no weights: looked for {' and '.join(_WEIGHTS)}")


def _read_shards(index: Path) -> dict[str, NdArray]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{index} has no weight_map from tensors to files")
    tensors: dict[str, NdArray] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise UserError(f"{index} names {file!r}, which is not a file beside it")
        tensors |= read_tensors(index.parent / file)
    if missing := [name for name in places if name not in tensors]:
        raise UserError(f"{index} names {missing[0]!r}, which {places[missing[0]]} does not hold")
    return tensors


class Fields:
    """The settings of a group in config.json, with the defaults of its class.

    transformers leaves out of a file what is as its config class has it; `defaults` are those of
    the class, as facts. Accessors raise UserError where a value is of another type.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        self._values = {**defaults, **values}
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def integer(self, name: str) -> int:
        value = self._values.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._odd(name, value, "a whole number")
        return value

    def positive(self, name: str) -> int:
        value = self.integer(name)
        if value < 1:
            raise self._odd(name, value, "a positive number")
        return value

    def number(self, name: str) -> float:
        value = self._values.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._odd(name, value, "a number")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._values.get(name)
        if not isinstance(value, bool):
            raise self._odd(name, value, "true or false")
        return value

    def text(self, name: str) -> str:
        value = self._values.get(name)
        if not isinstance(value, str):
            raise self._odd(name, value, "a name")
        return value

    def side(self, name: str) -> int:
        """The side of a square that is written as one number or as two."""
        value = self._values.get(name)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._odd(name, value, "the side of a square, in pixels")
        return value

    def token(self, name: str) -> int | None:
        """The id of a special token, where there is one."""
        value = self._values.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise self._odd(name, value, "the id of one token")
        return value

    def expect(self, name: str, wanted: Any) -> None:
        """Raises UserError where a setting differs from the only value that clip_jax has."""
        value = self._values.get(name, wanted)
        if value != wanted:
            raise self._odd(name, value, f"{json.dumps(wanted)}, the one thing clip_jax has")

    def _odd(self, name: str, value: Any, wanted: str) -> UserError:
        return UserError(f"{self.where}: {name} must be {wanted}, got {value!r}")


def group(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """A group of settings, empty where it is left out."""
    values = config.get(name)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: {name} must be a group of settings, got {values!r}")
    return values
