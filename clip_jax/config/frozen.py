"""Which parameters a run leaves as they are: locked towers and `optimizer.frozen`."""

import re
from collections.abc import Iterable

from clip_jax.config.errors import ConfigError
from clip_jax.config.schema import ExperimentConfig, OptimizerConfig


def is_frozen(config: ExperimentConfig, path: str) -> bool:
    """Whether no update moves the parameter at `path` ('image/blocks/mlp/up/kernel').

    Its tower is in `start.lock`, or a pattern of `optimizer.frozen` matches the whole path. Layers
    that `frozen_layers` leaves alone are parts of stacked arrays and not meant here.
    """
    if path.split("/", maxsplit=1)[0] in config.start.lock:
        return True
    return any(re.fullmatch(pattern, path) for pattern in config.optimizer.frozen)


def check_frozen(config: ExperimentConfig, paths: Iterable[str]) -> None:
    """Raises ConfigError where a pattern of `optimizer` is of none of the parameters' `paths`.

    Also where those of `frozen` leave nothing to train.
    """
    paths = tuple(paths)
    for pattern in config.optimizer.frozen:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ConfigError(
                f"config.optimizer.frozen {pattern!r} matches none of the {len(paths)} parameters; "
                f"it must match a whole path, as {paths[0]!r} or 'image/.*'"
            )
    for pattern in config.optimizer.no_decay:
        if pattern in OptimizerConfig().no_decay:
            continue  # of all models there are
        if not any(re.search(f"(?:{pattern})$", path) for path in paths):
            raise ConfigError(
                f"config.optimizer.no_decay {pattern!r} is the end of none of the {len(paths)} "
                f"parameters, as 'bias' is; one of them is {paths[0]!r}"
            )
    if all(is_frozen(config, path) for path in paths):
        raise ConfigError(
            f"config.optimizer.frozen {config.optimizer.frozen} and config.start.lock "
            f"{config.start.lock} leave none of the {len(paths)} parameters to train"
        )
