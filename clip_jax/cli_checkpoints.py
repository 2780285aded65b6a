"""`clip-jax checkpoints COMMAND`: the flags of each; `commands_checkpoints.py` has what they do."""

import argparse
from collections.abc import Callable
from typing import Any

from clip_jax import commands_checkpoints as commands


def add_checkpoint_commands(subparsers: Any) -> None:
    """Add `checkpoints` with its commands to the subparsers of `clip-jax`."""
    text = "Look at the checkpoints of a run: list, verify, remove them. Needs no accelerator."
    checkpoints = subparsers.add_parser(
        "checkpoints", help=text, description=text, allow_abbrev=False
    )
    actions = checkpoints.add_subparsers(dest="action", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = actions.add_parser(
            name, help=text, description=text, allow_abbrev=False
        )
        command.set_defaults(command=f"checkpoints {name}", run=run, takes_config=False)
        command.add_argument("--workdir", required=True, help="folder or bucket of the run")
        return command

    add("ls", commands.ls, "List them: step, when, size, score, why it is kept, whole or damaged.")

    text = "Compare every file and array with its checksum; exit code 2 where one differs."
    verify = add("verify", commands.verify, text)
    verify.add_argument("--step", type=int, nargs="+", help="which (default: all)")

    remove = add("rm", commands.rm, "Remove checkpoints, for good.")
    which = remove.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=int, nargs="+", help="these")
    which.add_argument("--all_but_latest", action="store_true", help="all but the newest whole one")
    which.add_argument("--damaged", action="store_true", help="those moved aside as damaged")
    remove.add_argument("--force", action="store_true", help="even the newest that is whole")
