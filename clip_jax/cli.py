"""`clip-jax COMMAND`: the flags of each command; `commands.py` has what they do."""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence

from clip_jax import commands
from clip_jax.cli_checkpoints import add_checkpoint_commands
from clip_jax.cli_data import add_data_commands
from clip_jax.cli_planning import add_planning_commands
from clip_jax.config.errors import UserError

_CONFIG_HELP = "recipe with get_config(), or the config.json of a workdir"
_FORMATS = ("open_clip", "huggingface", "big_vision")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns 0, 130 when stopped, or the `exit_code` of what went wrong."""
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        for before, this in itertools.pairwise(["", *overrides]):
            if not (arguments.takes_config and this.startswith("--config.")):
                split = before.startswith("--config.") and "=" not in before
                hint = f"write {before}={this}" if split else f"see clip-jax {arguments.command} -h"
                raise UserError(f"unknown argument {this!r}; {hint}")
        command: Callable[[argparse.Namespace, list[str]], int] = arguments.run
        return command(arguments, overrides)
    except UserError as error:
        print(f"clip-jax: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("clip-jax: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clip-jax", description="Contrastive image-text pretraining."
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(
        name: str, run: Callable[..., int], text: str, *, takes_config: bool = False
    ) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run, takes_config=takes_config)
        if takes_config:
            command.epilog = (
                "Any field, joined with '=': --config.seed=3; --config.loss.tile_size=None unsets "
                "one"
            )
        return command

    train = add(
        "train",
        commands.train,
        "Train a recipe; resumes a workdir that is there.",
        takes_config=True,
    )
    train.add_argument("--config", required=True, help=_CONFIG_HELP)
    train.add_argument("--workdir", required=True, help="folder of the run")
    train.add_argument(
        "--allow_config_change",
        action="store_true",
        help="resume although fields that change the result differ",
    )
    train.add_argument(
        "--profile_steps", metavar="FIRST:LAST", help="trace these steps into WORKDIR/profile"
    )

    text = "Score a run's checkpoint and write its report."
    evaluate = add("eval", commands.evaluate, text, takes_config=True)
    evaluate.add_argument("--workdir", required=True, help="folder of the run")
    evaluate.add_argument("--step", type=int, help="which checkpoint (default: the latest)")
    evaluate.add_argument("--ema", action="store_true", help="the moving average of the weights")

    for command in (train, evaluate):
        command.add_argument("--coordinator", help="host:port of process 0, for several processes")
        command.add_argument("--num_processes", type=int, help="with --coordinator: how many")
        command.add_argument("--process_id", type=int, help="with --coordinator: which this is")
        command.add_argument(
            "--distributed", action="store_true", help="several processes that JAX finds by itself"
        )

    text = "Print the resolved config of a recipe as JSON."
    show = add("config", commands.show_config, text, takes_config=True)
    show.add_argument("--config", required=True, help=_CONFIG_HELP)

    models = add("models", commands.list_models, "List the named models and what they cost.")
    models.add_argument("containing", nargs="?", default="", help="part of a name or family")

    text = "Make a workdir of another library's checkpoint."
    import_ = add("import", commands.import_checkpoint, text)
    import_.add_argument(
        "--from", dest="source", required=True, help="its folder, or file of weights"
    )
    import_.add_argument("--format", required=True, choices=_FORMATS)
    import_.add_argument("--output", required=True, help="new folder, for --config.start.model")

    export = add("export", commands.export_checkpoint, "Write a checkpoint for another library.")
    export.add_argument("--workdir", help="folder of a run or import")
    export.add_argument("--checkpoint", help="or one checkpoint: WORKDIR/checkpoints/STEP")
    export.add_argument("--step", type=int, help="with --workdir (default: the latest)")
    export.add_argument("--format", required=True, choices=(*_FORMATS, "onnx"))
    export.add_argument("--output", required=True, help="new folder")
    export.add_argument("--ema", action="store_true", help="the moving average of the weights")
    export.add_argument(
        "--drop_framing", action="store_true", help="though images must then be cut out beforehand"
    )

    tokenizer = add("tokenizer", commands.train_tokenizer, "Train a tokenizer on captions.")
    tokenizer.add_argument("action", choices=("train",))
    tokenizer.add_argument("--data", required=True, help="tar files, as in data.sources.X.path")
    tokenizer.add_argument(
        "--data_kind", default="webdataset", choices=("webdataset", "quickstart")
    )
    tokenizer.add_argument("--kind", default="bpe", choices=("bpe", "wordpiece"))
    tokenizer.add_argument("--vocab_size", type=int, default=32_000)
    tokenizer.add_argument("--keep_case", action="store_true", help="no lower-casing")
    tokenizer.add_argument("--output", required=True, help="the tokenizer.json to write")

    add_data_commands(subparsers)
    add_checkpoint_commands(subparsers)
    add_planning_commands(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
