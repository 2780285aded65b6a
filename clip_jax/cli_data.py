"""`clip-jax data COMMAND`: the flags of each; `commands_data.py` has what they do."""

import argparse
from collections.abc import Callable
from typing import Any

from clip_jax import commands_data as commands

_CONFIG_HELP = "recipe with get_config(), or the config.json of a workdir"
_EPILOG = "Any field of the recipe, joined with '=': --config.data.num_threads=8"
_KINDS = ("webdataset", "tfds", "parquet", "table", "folder", "array_record", "quickstart")


def add_data_commands(subparsers: Any) -> None:
    """Add `data` with its commands to the subparsers of `clip-jax`."""
    text = "Look at training data: check it, index it, time it, show it."
    data = subparsers.add_parser("data", help=text, description=text, allow_abbrev=False)
    actions = data.add_subparsers(dest="action", metavar="COMMAND", required=True)

    def add(
        name: str, run: Callable[..., int], text: str, *, takes_config: bool = True
    ) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = actions.add_parser(
            name, help=text, description=text, allow_abbrev=False
        )
        command.set_defaults(command=f"data {name}", run=run, takes_config=takes_config)
        command.epilog = _EPILOG if takes_config else None
        return command

    _add_check_flags(add("check", commands.check, "Find out what sources hold and what is wrong."))

    text = "Build the indexes of tars, so that training starts at once; goes on where it stopped."
    index = add("index", commands.index, text, takes_config=False)
    index.add_argument("path", help="tar files, as in data.sources.X.path")
    index.add_argument("--beside", action="store_true", help="keep each index beside its tar")
    index.add_argument("--cache_dir", help="where else (default: as a run would)")
    index.add_argument("--retries", type=int, default=3, help="of a read that fails")

    text = "Time each stage of the input pipeline of a recipe and say which one limits it."
    bench = add("bench", commands.bench, text)
    bench.add_argument("--config", required=True, help=_CONFIG_HELP)
    bench.add_argument("--batches", type=int, help="how many to time (default: --seconds long)")
    bench.add_argument(
        "--seconds", type=float, default=20.0, help="how long, for each of two parts"
    )
    bench.add_argument("--target", type=float, help="samples/s: how many cores that takes")

    text = "Draw what the model sees: images after augmentation with the captions it is fed."
    show = add("show", commands.show, text)
    show.add_argument("--config", required=True, help=_CONFIG_HELP)
    show.add_argument("--count", type=int, default=64, help="samples")
    show.add_argument("--start_sample", type=int, default=0, help="place in the order of the run")
    show.add_argument("--output", default="show.png", help="FILE.png or FILE.html")


def _add_check_flags(check: argparse.ArgumentParser) -> None:
    check.add_argument("source", nargs="?", help="path, as in data.sources.X.path; or --config")
    check.add_argument("--config", help=f"all sources of a {_CONFIG_HELP}")
    check.add_argument(
        "--kind", default="webdataset", choices=_KINDS, help="of SOURCE (default: tars)"
    )
    check.add_argument("--split", default="train", help="of a tfds set")
    check.add_argument("--image_key", default="", help="column or feature of the image")
    check.add_argument("--caption_keys", default="", help="of the captions: a,b")
    check.add_argument("--templates", nargs="+", help="prompts with {}, of sets that have classes")
    check.add_argument("--tokenizer", default="clip", help="clip, or a file (default: clip)")
    check.add_argument("--context_length", type=int, default=77, help="tokens of a caption")
    check.add_argument("--image_size", type=int, default=224, help="pixels of the image tower")
    check.add_argument("--samples", type=int, default=10_000, help="to read; 0: all of them")
    check.add_argument("--threads", type=int, help="that read (default: one per processor)")
    check.add_argument("--output", default="check.html", help="the page to write")
    check.add_argument("--json", help="a file for the figures")
    check.add_argument("--cache_dir", help="of tar indexes (default: as a run would)")
