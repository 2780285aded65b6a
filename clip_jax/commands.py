"""What each command of `clip-jax` does: arguments in, one call out. Heavy imports are late."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_jax.config.errors import UserError

if TYPE_CHECKING:
    from clip_jax.config import ExperimentConfig


def show_config(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from clip_jax.config import to_json

    print(to_json(_load_config(arguments.config, overrides)), end="")
    return 0


def train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    config = _load_config(arguments.config, overrides)
    from clip_jax.checkpoint import Workdir
    from clip_jax.data.sources import cache_dir
    from clip_jax.parallel import ending_together
    from clip_jax.parallel.backend import set_xla_flags
    from clip_jax.training import loop
    from clip_jax.training.profiling import parse_profile_steps

    workdir = Workdir(arguments.workdir)
    if arguments.profile_steps is not None:
        steps = parse_profile_steps(arguments.profile_steps)
        config = dataclasses.replace(
            config, logging=dataclasses.replace(config.logging, profile_steps=steps)
        )
    # Kept with the run where it can be: kernels are chosen once.
    local = workdir.path if isinstance(workdir.path, Path) else cache_dir(config.data)
    set_xla_flags(deterministic=config.deterministic, autotuned=local / "autotuned")
    _start(arguments, cache_dir(config.data), heartbeat_seconds=config.heartbeat_seconds)
    with ending_together(config.heartbeat_seconds):
        outcome = loop.train(config, workdir, allow_config_change=arguments.allow_config_change)
    if not outcome.finished:
        return 130
    _print_result(outcome.scores, workdir.report)
    return 0


def evaluate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from clip_jax.checkpoint import Workdir
    from clip_jax.config.load import load_config

    workdir = Workdir(arguments.workdir)
    saved = workdir.load_config()
    if arguments.ema and saved.optimizer.ema_decay is None:
        raise UserError(f"{workdir.path} keeps no moving average of its weights: leave out --ema")
    if arguments.ema:
        overrides = [*overrides, "--config.evaluation.use_ema=True"]
    config = load_config(overrides, saved=saved, trains=False)
    from clip_jax.data.sources import cache_dir
    from clip_jax.parallel import ending_together
    from clip_jax.training.evaluate_run import evaluate_run

    _start(arguments, cache_dir(config.data), heartbeat_seconds=config.heartbeat_seconds)
    with ending_together(config.heartbeat_seconds):
        scores, report = evaluate_run(config, workdir, step=arguments.step)
    _print_result(scores, report)
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


def _load_config(path: str, overrides: list[str]) -> "ExperimentConfig":
    from clip_jax.config import parse_json
    from clip_jax.config.load import load_config

    if "://" not in path:
        return load_config([f"--config={path}", *overrides])
    from clip_jax.checkpoint import any_path

    try:
        text = any_path(path).read_text().encode()
    except FileNotFoundError:
        raise UserError(f"there is no config {path}") from None
    return load_config(overrides, saved=parse_json(text, path))


def _start(arguments: argparse.Namespace, cache: Path, *, heartbeat_seconds: int = 100) -> None:
    import jax

    from clip_jax.parallel import start_processes
    from clip_jax.parallel.host_memory import use_one_arena

    use_one_arena()
    # A second start of the same program compiles nothing. $JAX_COMPILATION_CACHE_DIR wins.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
    start_processes(
        arguments.coordinator,
        arguments.num_processes,
        arguments.process_id,
        distributed=arguments.distributed,
        heartbeat_seconds=heartbeat_seconds,
    )


def _print_result(scores: dict[str, Any], report: Any) -> None:
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
