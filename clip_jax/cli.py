"""`clip-jax COMMAND`: flags in, one call out. Heavy imports wait until the command is known."""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from clip_jax.config.errors import UserError

_CONFIG_HELP = "recipe with get_config(), or the config.json of a workdir"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns 0, 2 for what the user can mend, or 130 when interrupted."""
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        for before, this in itertools.pairwise(["", *overrides]):
            if not this.startswith("--config."):
                split = before.startswith("--config.") and "=" not in before
                hint = f"write {before}={this}" if split else f"see clip-jax {arguments.command} -h"
                raise UserError(f"unknown argument {this!r}; {hint}")
        command: Callable[[argparse.Namespace, list[str]], int] = arguments.run
        return command(arguments, overrides)
    except UserError as error:
        print(f"clip-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("clip-jax: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clip-jax", description="Contrastive image-text pretraining."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    train = add("train", _train, "Train a recipe; an existing workdir is resumed.")
    train.add_argument("--config", required=True, help=_CONFIG_HELP)
    train.add_argument("--workdir", required=True, help="folder of the run")
    train.add_argument(
        "--allow_config_change",
        action="store_true",
        help="resume although fields that change the result differ",
    )

    evaluate = add("eval", _eval, "Score a run's checkpoint and write its report.")
    evaluate.add_argument("--workdir", required=True, help="folder of the run")
    evaluate.add_argument("--step", type=int, help="which checkpoint (default: the latest)")

    for command in (train, evaluate):
        command.add_argument("--coordinator", help="host:port of process 0, for several processes")
        command.add_argument("--num_processes", type=int, help="with --coordinator: how many")
        command.add_argument("--process_id", type=int, help="with --coordinator: which this is")
        command.add_argument(
            "--distributed", action="store_true", help="several processes that JAX finds by itself"
        )

    show = add("config", _config, "Print the resolved config of a recipe as JSON.")
    show.add_argument("--config", required=True, help=_CONFIG_HELP)
    for command in (train, evaluate, show):
        command.epilog = (
            "Any field, joined with '=': --config.seed=3; --config.loss.tile_size=None unsets one"
        )
    return parser


def _config(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from clip_jax.config import to_json
    from clip_jax.config.load import load_config

    print(to_json(load_config([f"--config={arguments.config}", *overrides])), end="")
    return 0


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from clip_jax.config.load import load_config

    config = load_config([f"--config={arguments.config}", *overrides])
    from clip_jax.checkpoint import Workdir
    from clip_jax.data.sources import cache_dir
    from clip_jax.training.loop import train

    _start(arguments, cache_dir(config.data))
    workdir = Workdir(arguments.workdir)
    outcome = train(config, workdir, allow_config_change=arguments.allow_config_change)
    if not outcome.finished:
        return 130
    _print_result(outcome.scores, workdir.report)
    return 0


def _eval(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from clip_jax.checkpoint import Workdir
    from clip_jax.config.load import load_config

    workdir = Workdir(arguments.workdir)
    workdir.load_config()
    config = load_config([f"--config={workdir.config}", *overrides])
    from clip_jax.data.sources import cache_dir
    from clip_jax.training.evaluate_run import evaluate_run

    _start(arguments, cache_dir(config.data))
    _print_result(*evaluate_run(config, workdir, step=arguments.step))
    return 0


def _start(arguments: argparse.Namespace, cache: Path) -> None:
    import jax

    from clip_jax.parallel import start_processes

    # A second start of the same program compiles nothing. $JAX_COMPILATION_CACHE_DIR wins.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
    start_processes(
        arguments.coordinator,
        arguments.num_processes,
        arguments.process_id,
        distributed=arguments.distributed,
    )


def _print_result(scores: dict[str, float], report: Path) -> None:
    """On the first process: the others would say it again."""
    import jax

    if jax.process_index() != 0:
        return
    for name, value in scores.items():
        chance = scores.get(f"{name}/chance")
        if chance is not None:
            print(f"{name:55} {value:7.2%}   chance {chance:.2%}")
    if report.exists():
        print(f"report: {report}")


if __name__ == "__main__":
    sys.exit(main())
