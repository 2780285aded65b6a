"""What each command of `clip-jax` does: arguments in, one call out. Heavy imports are late."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from clip_jax.config.errors import UserError


def show_config(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from clip_jax.config import to_json
    from clip_jax.config.load import load_config

    print(to_json(load_config([f"--config={arguments.config}", *overrides])), end="")
    return 0


def train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from clip_jax.config.load import load_config

    config = load_config([f"--config={arguments.config}", *overrides])
    from clip_jax.checkpoint import Workdir
    from clip_jax.data.sources import cache_dir
    from clip_jax.training import loop

    _start(arguments, cache_dir(config.data))
    workdir = Workdir(arguments.workdir)
    try:
        outcome = loop.train(config, workdir, allow_config_change=arguments.allow_config_change)
    except UserError as error:
        _leave_others(error)
        raise
    if not outcome.finished:
        return 130
    _print_result(outcome.scores, workdir.report)
    return 0


def evaluate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from clip_jax.checkpoint import Workdir
    from clip_jax.config.load import load_config

    workdir = Workdir(arguments.workdir)
    workdir.load_config()
    config = load_config([f"--config={workdir.config}", *overrides], trains=False)
    from clip_jax.data.sources import cache_dir
    from clip_jax.training.evaluate_run import evaluate_run

    _start(arguments, cache_dir(config.data))
    _print_result(*evaluate_run(config, workdir, step=arguments.step))
    return 0


def list_models(arguments: argparse.Namespace, _: list[str]) -> int:
    from clip_jax.models.summary import model_rows, model_table

    rows = list(model_rows(containing=arguments.containing))
    if not rows:
        raise UserError(f"no model has {arguments.containing!r} in its name or family")
    print(model_table(rows), end="")
    return 0


def import_checkpoint(arguments: argparse.Namespace, _: list[str]) -> int:
    from clip_jax.checkpoint import Workdir
    from clip_jax.interop.transfer import import_weights

    source = Path(arguments.source)
    print(import_weights(source, arguments.format, Workdir(arguments.output)))
    return 0


def export_checkpoint(arguments: argparse.Namespace, _: list[str]) -> int:
    from clip_jax.checkpoint import Workdir
    from clip_jax.interop.transfer import export_weights, weights_of_checkpoint, weights_of_workdir

    if (arguments.workdir is None) == (arguments.checkpoint is None):
        raise UserError("export takes one of --workdir and --checkpoint")
    if arguments.checkpoint is not None and arguments.step is not None:
        raise UserError("--step goes with --workdir; --checkpoint names the folder of one step")
    weights = (
        weights_of_workdir(Workdir(arguments.workdir), arguments.step, ema=arguments.ema)
        if arguments.checkpoint is None
        else weights_of_checkpoint(Path(arguments.checkpoint), ema=arguments.ema)
    )
    output = Path(arguments.output).expanduser().absolute()
    if arguments.format == "onnx":
        from clip_jax.interop.onnx import export_onnx

        print("\n  ".join([f"{output}: {weights.model.name}", *export_onnx(weights, output)]))
        return 0
    drops = arguments.drop_framing
    print(export_weights(weights, arguments.format, output, drop_framing=drops))
    return 0


def train_tokenizer(arguments: argparse.Namespace, _: list[str]) -> int:
    from clip_jax.config import DataConfig, SourceConfig
    from clip_jax.data import train_tokenizer as data
    from clip_jax.data.sources import cache_dir

    source = SourceConfig(kind=arguments.data_kind, path=arguments.data)
    result = data.train_tokenizer(
        {"captions": source},
        cache_dir(DataConfig()),
        kind=arguments.kind,
        vocab_size=arguments.vocab_size,
        lowercase=not arguments.keep_case,
        output=Path(arguments.output).expanduser(),
    )
    tokenizer = result.tokenizer
    print(
        f"{result.output}: {tokenizer.vocab_size} tokens from {result.num_captions:,} captions; "
        f"{result.tokens_per_caption:.1f} tokens a caption, at most {result.longest_caption}"
    )
    print(
        f"  a run needs model.text.vocab_size={tokenizer.vocab_size} or more, "
        f"eot_id={tokenizer.eot_id}, pad_id={tokenizer.pad_id}"
    )
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


def _leave_others(error: UserError) -> None:
    """End this process at once where it is one of several.

    The others wait for it in a collective, and an orderly end would wait for them; but when it is
    gone, JAX's coordination service ends them too.
    """
    import jax

    if jax.process_count() > 1:
        print(f"clip-jax: {error}", file=sys.stderr, flush=True)
        os._exit(2)


def _print_result(scores: dict[str, Any], report: Path) -> None:
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
