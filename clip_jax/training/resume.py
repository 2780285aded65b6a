"""Whether a run may start, or go on, in a workdir. Nothing is written until all checks pass."""

from collections.abc import Mapping
from typing import Any

from clip_jax.checkpoint import Workdir
from clip_jax.config import MAY_CHANGE_ON_RESUME, ExperimentConfig, UserError, flatten


def check_workdir(
    workdir: Workdir, config: ExperimentConfig, *, allow_config_change: bool
) -> dict[str, tuple[Any, Any]]:
    """The fields in which `config` differs from the run in `workdir`: {key: (saved, new)}.

    Raises UserError where the folder cannot be written, or the run in it is another one.
    """
    workdir.check_writable()
    if not workdir.exists():
        # A start that failed early may leave an empty folder.
        if workdir.checkpoints.exists() and any(workdir.checkpoints.glob("[0-9]*")):
            raise UserError(
                f"{workdir.path} has checkpoints but no config.json; use another --workdir"
            )
        return {}
    if (workdir.checkpoints / "0").exists():  # runs save from their first step on
        raise UserError(
            f"{workdir.path} holds imported weights; train them in another --workdir with "
            f"--config.start.model={workdir.path}"
        )
    saved, new = flatten(workdir.load_config()), flatten(config)
    changed = {
        key: (saved.get(key), new.get(key))
        for key in sorted(saved.keys() | new.keys())
        if saved.get(key) != new.get(key)
    }
    for key in changed:
        if key.startswith("data.tokenizer."):
            raise UserError(
                f"{workdir.path} keeps its tokenizer for life, so {key} cannot change from "
                f"{changed[key][0]!r} to {changed[key][1]!r}; use another --workdir"
            )
    refused = {key: values for key, values in changed.items() if not _may_change(key)}
    if refused and not allow_config_change:
        listed = ", ".join(f"{key} {old!r} -> {now!r}" for key, (old, now) in refused.items())
        raise UserError(
            f"{workdir.path} holds a run with another config: {listed}; use another --workdir, or "
            "--allow_config_change to go on with the new values"
        )
    return changed


def describe_changes(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """A line for each of the changes that `check_workdir` found."""
    return [f"config change on resume: {k} {old!r} -> {new!r}" for k, (old, new) in changes.items()]


def _may_change(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in MAY_CHANGE_ON_RESUME)
