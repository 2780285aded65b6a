"""From `--config=recipe.py --config.a.b=v` on the command line to a checked config."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from clip_jax.config.convert import from_config_dict, load_json, to_config_dict, unknown_key
from clip_jax.config.errors import ConfigError
from clip_jax.config.schema import ExperimentConfig
from clip_jax.config.validation import validate


def load_config(arguments: Sequence[str]) -> ExperimentConfig:
    """The config that `--config=...` and `--config.key=value` arguments describe, validated.

    `--config` names a recipe (a .py file with `get_config()`, or `file.py:argument` for
    `get_config(argument)`) or the `config.json` of a workdir. Raises ConfigError in one line for
    what does not fit.
    """
    path = next((a.split("=", 1)[1] for a in arguments if a.startswith("--config=")), None)
    if path is None:
        raise ConfigError("--config=RECIPE.py is missing, as in --config=configs/quickstart.py")
    overrides = [a for a in arguments if not a.startswith("--config=")]
    base = _base(path)
    for override in overrides:
        _check_key(override, base)
    values = flags.FlagValues()
    argv = ["clip-jax", *overrides]
    try:
        # ml_collections makes a flag of each field and parses the overrides by the field's type.
        config_flags.DEFINE_config_dict("config", base, flag_values=values, sys_argv=argv)
        rest = values(argv)
        config = from_config_dict(values.config)
    except flags.Error as error:
        raise ConfigError(str(error).splitlines()[0].replace("flag --", "")) from None
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}; settings are --config.key=value")
    return validate(config)


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
        return module.get_config(argument) if argument else module.get_config()
    except (SyntaxError, ImportError, AttributeError, TypeError, NameError) as error:
        raise ConfigError(f"recipe {file}: {type(error).__name__}: {error}") from error
