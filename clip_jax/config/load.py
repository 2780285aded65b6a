"""From `--config=recipe.py --config.a.b=v` on the command line to a checked config."""

import dataclasses
import difflib
import importlib.util
import inspect
import os
import re
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from clip_jax.config import schema
from clip_jax.config.convert import from_config_dict, load_json, to_config_dict, unknown_key
from clip_jax.config.errors import ConfigError, UserError
from clip_jax.config.lengths import resolve_lengths
from clip_jax.config.schema import EvalSetConfig, ExperimentConfig, SourceConfig
from clip_jax.config.start import apply_start
from clip_jax.config.validation import validate

# Overrides that may name an entry for the first time: by its path, which every entry needs.
_NEW_ENTRY = re.compile(r"--config\.(data\.sources|evaluation\.sets)\.(\w+)\.path=")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_ENTRIES = {"data.sources": SourceConfig, "evaluation.sets": EvalSetConfig}


def load_config(
    arguments: Sequence[str], *, saved: ExperimentConfig | None = None, trains: bool = True
) -> ExperimentConfig:
    """The config that `--config=...` and `--config.key=value` arguments describe, validated.

    `--config` names a recipe (a .py file with `get_config()`, or `file.py:argument` for
    `get_config(argument)`) or the `config.json` of a workdir. The value None unsets a field that
    may be left out; the path of a source or evaluation set may name a new one. trains: False where
    nothing is trained, so that there need be no source. Raises ConfigError in one line for what
    does not fit.
    """
    path = next((a.split("=", 1)[1] for a in arguments if a.startswith("--config=")), None)
    if path is None and saved is None:
        raise ConfigError("--config=RECIPE.py is missing, as in --config=configs/quickstart.py")
    overrides = [a for a in arguments if not a.startswith("--config=")]
    is_saved = path is None or path.endswith(".json")
    base = to_config_dict(saved) if path is None else _base(path)
    base = _with_new_entries(base, overrides)
    for override in overrides:
        _check_key(override, base)
    # A saved config.json has been through this; what it says of its model is final.
    base = apply_start(base, overrides, saved=is_saved)
    overrides, unset = _split_unset(overrides)
    values = flags.FlagValues()
    argv = ["clip-jax", *overrides]
    try:
        # ml_collections makes a flag of each field and parses the overrides by the field's type.
        config_flags.DEFINE_config_dict("config", base, flag_values=values, sys_argv=argv)
        rest = values(argv)
        for key in unset:
            *groups, leaf = key.split(".")
            group = values.config
            for name in groups:
                group = group[name]
            with group.ignore_type():
                group[leaf] = None
        config = from_config_dict(values.config)
    except flags.Error as error:
        raise ConfigError(str(error).splitlines()[0].replace("flag --", "")) from None
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}; settings are --config.key=value")
    return validate(resolve_lengths(config), trains=trains)


def _with_new_entries(base: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """`base` with the sources and sets that overrides name and it does not have, at defaults."""
    new = [match.groups() for override in overrides if (match := _NEW_ENTRY.match(override))]
    if new:
        base = to_config_dict(from_config_dict(base))  # all groups are there, and its own
    for group, name in new:
        entries = base.data.sources if group == "data.sources" else base.evaluation.sets
        if name not in entries:
            entries[name] = to_config_dict(_ENTRIES[group]())
    return base


def _check_key(override: str, base: ConfigDict) -> None:
    if not override.startswith("--config."):
        return
    key = override.removeprefix("--config.").split("=", 1)[0]
    group: Any = base
    for i, part in enumerate(parts := key.split(".")):
        if not isinstance(group, ConfigDict) or part not in group:
            prefix = "".join(f"{p}." for p in parts[:i])
            siblings = list(group) if isinstance(group, ConfigDict) else []
            raise ConfigError(unknown_key(key, [f"{prefix}{name}" for name in siblings]))
        group = group[part]
    if "=" not in override and not isinstance(group, bool):
        raise ConfigError(f"{override} has no value; settings are --config.key=value, with a =")


def _split_unset(overrides: list[str]) -> tuple[list[str], list[str]]:
    """Overrides without `key=None`, which the parsers of ml_collections refuse, and those keys.

    Of several for one key the last counts.
    """
    last = {override.split("=", 1)[0]: override for override in overrides}
    unset = [key for key, override in last.items() if override == f"{key}=None"]
    kept = [override for override in overrides if override.split("=", 1)[1:] != ["None"]]
    return kept, [key.removeprefix("--config.") for key in unset]


def _base(path: str) -> ConfigDict:
    """What the recipe or saved config says, before overrides."""
    file, _, argument = path.partition(":")
    if not os.path.isfile(file):
        raise ConfigError(f"there is no recipe {file}")
    if file.endswith(".json"):
        return to_config_dict(load_json(file))
    spec = importlib.util.spec_from_file_location("recipe", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is neither a .py recipe nor a config.json")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return _call(module, file, argument)
    except Exception as error:
        raise ConfigError(f"recipe {file}{_line(error, file)}: {_reason(error)}") from error


def _call(module: ModuleType, file: str, argument: str) -> ConfigDict:
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError("it has no function get_config()")
    takes = inspect.signature(module.get_config).parameters.values()
    if argument and not takes:
        raise ConfigError(f"it has no variants: get_config() takes no argument, not {argument!r}")
    if not argument and any(p.default is p.empty and p.kind in _POSITIONAL for p in takes):
        raise ConfigError("it has variants, and one is to be named: --config=RECIPE.py:VARIANT")
    config = module.get_config(argument) if argument else module.get_config()
    if isinstance(config, ExperimentConfig):
        return to_config_dict(config)
    if not isinstance(config, ConfigDict):
        returned = "None" if config is None else f"a {type(config).__name__}"
        raise ConfigError(f"get_config() returned {returned}, not an ExperimentConfig; add return")
    # A frozen one takes no overrides.
    return ConfigDict(config) if isinstance(config, FrozenConfigDict) else config


def _line(error: Exception, file: str) -> str:
    """` line N`, the last of the recipe on the way to the error, where there is one."""
    file = os.path.abspath(file)  # as the import system spells it
    if isinstance(error, SyntaxError) and error.filename == file:
        return f" line {error.lineno}"
    numbers = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return f" line {numbers[-1]}" if numbers else ""


def _reason(error: Exception) -> str:
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    if isinstance(error, UserError):
        return text
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    if match and dataclasses.is_dataclass(section := getattr(schema, match[1], None)):
        # From Python 3.13 the message has a suggestion of its own: all say the same here.
        names = [field.name for field in dataclasses.fields(section)]
        near = difflib.get_close_matches(match[2], names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"its fields: {', '.join(names)}"
        text = f"{match[1]} has no field {match[2]!r}; {hint}"
    return f"{type(error).__name__}: {text}"
