"""What each command of `clip-jax data` does: arguments in, one call out. Heavy imports are late."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clip_jax.config.errors import UserError

if TYPE_CHECKING:
    from clip_jax.config import ExperimentConfig
    from clip_jax.data.record import Source

_SHORTEST = 3  # tokens: start, one of the caption, end
_MOST_SHOWN = 1024  # samples of a sheet: at 224 pixels they take some 500 MB of memory


def check(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """0 if every source has samples that can be used, else 1."""
    config = _config_to_check(arguments, overrides)
    from clip_jax.data.check import check_source
    from clip_jax.data.check_report import write_check_report
    from clip_jax.data.check_schema import describe_schema
    from clip_jax.data.check_summary import table, to_json
    from clip_jax.data.configured_text import configured_tokenizer

    page = _writable(arguments.output)
    figures = None if arguments.json is None else _writable(arguments.json)
    sources = _open(config, on_bad_sample="skip")
    tokenizer = configured_tokenizer(config, sources, _saved_tokenizer(arguments.config))
    checks = []
    for name, source in sources.items():
        with _Progress(name) as progress:
            result = check_source(
                name,
                source,
                tokenizer,
                context_length=config.model.text.context_length,
                image_size=config.model.image.image_size,
                group_size=config.data.packing.group_size or 32,
                num_samples=arguments.samples or None,
                num_threads=arguments.threads,
                progress=progress,
            )
        result.schema = describe_schema(config.data.sources[name].kind, source)
        print(table(result))
        checks.append(result)
    with _file_errors(page):
        write_check_report(page, checks, sources)
    if figures is not None:
        with _file_errors(figures):
            figures.write_text(json.dumps([to_json(check) for check in checks], indent=2) + "\n")
    print(f"page: {page}")
    return 0 if all(check.num_usable for check in checks) else 1


def index(arguments: argparse.Namespace, _: list[str]) -> int:
    """0 if every tar can be read to its end, else 1."""
    if arguments.retries < 0:
        raise UserError(f"--retries must be 0 or more, got {arguments.retries}")
    from clip_jax.config import DataConfig
    from clip_jax.data.sources import cache_dir
    from clip_jax.data.sources.tar_index import index_tars
    from clip_jax.data.sources.tar_scan import NO_END

    with _Progress("tars") as progress:
        done = index_tars(
            arguments.path,
            cache_dir(DataConfig(cache_dir=arguments.cache_dir)),
            beside=arguments.beside,
            retries=arguments.retries,
            progress=progress,
        )
    present = done.num_tars - done.num_scanned
    print(
        f"{done.num_tars:,} tars, {done.num_samples:,} samples; {done.num_scanned:,} tars scanned "
        f"in {done.seconds:.1f} s, {present:,} had an index"
    )
    if done.num_scanned == done.num_tars:
        print(f"{done.num_samples / max(done.seconds, 1e-3):,.0f} samples/s")
    if done.num_skipped:
        print(f"{done.num_skipped:,} samples without image or caption are left out")
    for path, reason in done.damaged:
        print(f"damaged: {path}: {reason}")
    # Some writers leave the end marker out: worth a line, but all of the tar is used.
    return 1 if any(reason != NO_END for _, reason in done.damaged) else 0


def bench(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from clip_jax.config.load import load_config

    if arguments.seconds <= 0 or (arguments.batches or 1) < 1 or (arguments.target or 1) <= 0:
        raise UserError("--seconds, --batches and --target are more than 0")
    config = load_config([f"--config={arguments.config}", *overrides])
    from clip_jax.data import bench
    from clip_jax.data.configured_text import configured_text, configured_tokenizer

    sources = {} if config.data.streams else _open(config, config.data.on_bad_sample)
    tokenizer = configured_tokenizer(config, sources, _saved_tokenizer(arguments.config))
    text = configured_text(config, sources, tokenizer)
    alone = None
    if sources:
        alone = bench.time_stages(config, sources, text, seconds=arguments.seconds)
    whole = bench.time_end_to_end(
        config, sources, text, seconds=arguments.seconds, num_batches=arguments.batches
    )
    print(bench.table(config, alone, whole, arguments.target), end="")
    return 0


def show(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from clip_jax.config.load import load_config

    if not 1 <= arguments.count <= _MOST_SHOWN:
        raise UserError(f"--count is 1 to {_MOST_SHOWN}, got {arguments.count}")
    if arguments.start_sample < 0:
        raise UserError(f"--start_sample is 0 or more, got {arguments.start_sample}")
    config = load_config([f"--config={arguments.config}", *overrides])
    from clip_jax.data.configured_text import configured_text, configured_tokenizer
    from clip_jax.data.show import check_output, shown_samples, write_sheet

    output = _writable(arguments.output)
    check_output(output)
    sources = {} if config.data.streams else _open(config, config.data.on_bad_sample)
    tokenizer = configured_tokenizer(config, sources, _saved_tokenizer(arguments.config))
    text = configured_text(config, sources, tokenizer)
    samples = shown_samples(
        config,
        sources,
        tokenizer,
        text,
        start_sample=arguments.start_sample,
        count=arguments.count,
    )
    first = arguments.start_sample
    title = f"{config.name}: samples {first:,} to {first + arguments.count - 1:,}"
    with _file_errors(output):
        write_sheet(output, samples, title=title)
    print(f"{title}: {output}")
    return 0


def _config_to_check(arguments: argparse.Namespace, overrides: list[str]) -> "ExperimentConfig":
    """The recipe, or a config of the one source and tokenizer that the flags name."""
    if (arguments.source is None) == (arguments.config is None):
        raise UserError("data check takes one of SOURCE, a path, and --config=RECIPE")
    if arguments.samples < 0 or (arguments.threads or 1) < 1:
        raise UserError("--samples is 0 or more, --threads is 1 or more")
    if arguments.config is not None:
        from clip_jax.config.load import load_config

        return load_config([f"--config={arguments.config}", *overrides])
    if overrides:
        raise UserError(f"{overrides[0]} goes with --config=RECIPE; SOURCE has flags of its own")
    from clip_jax import config as settings

    templates = tuple(arguments.templates or ("{}",))
    if any("{}" not in template for template in templates):
        raise UserError(f"--templates are prompts that contain {{}}, got {templates}")
    if arguments.context_length < _SHORTEST or arguments.image_size < 1:
        raise UserError(f"--context_length is {_SHORTEST} or more, --image_size is 1 or more")
    if arguments.kind == "webdataset" and Path(arguments.source).is_dir():
        raise UserError(
            f"{arguments.source} is a folder: --kind=folder for images in it, or "
            f"'{arguments.source}/*.tar' for tars"
        )
    own = arguments.tokenizer != "clip"
    tokenizer = settings.TokenizerConfig(
        kind="file" if own else "clip", path=arguments.tokenizer if own else ""
    )
    source = settings.SourceConfig(
        kind=arguments.kind,
        path=arguments.source,
        split=arguments.split,
        image_key=arguments.image_key,
        caption_keys=tuple(filter(None, arguments.caption_keys.split(","))),
        templates=templates,
    )
    return settings.ExperimentConfig(
        data=settings.DataConfig(
            sources={arguments.source: source},
            tokenizer=tokenizer,
            cache_dir=arguments.cache_dir,
        ),
        model=settings.ModelConfig(
            image=settings.ImageTowerConfig(image_size=arguments.image_size),
            text=settings.TextTowerConfig(context_length=arguments.context_length),
        ),
    )


def _open(
    config: "ExperimentConfig", on_bad_sample: Literal["skip", "fail"]
) -> dict[str, "Source"]:
    """The sources of a config, for random access."""
    from clip_jax.data.sources import cache_dir, open_source

    data = config.data
    return {
        name: open_source(
            source,
            cache_dir(data),
            retries=data.read_retries,
            on_bad_sample=on_bad_sample,
        )
        for name, source in data.sources.items()
    }


def _saved_tokenizer(config: str | None) -> Path | None:
    """The tokenizer of a workdir, where `config` is the config.json of one."""
    if config is None or not config.endswith(".json"):
        return None
    return Path(config).with_name("tokenizer.json")


def _writable(path: str) -> Path:
    """Raises UserError, before anything is read, where a file of this name cannot be made."""
    file = Path(path).expanduser().absolute()
    if not file.parent.is_dir():
        raise UserError(f"there is no folder {file.parent}; make it first")
    if file.is_dir():
        raise UserError(f"{file} is a folder; name a file")
    return file


@contextmanager
def _file_errors(file: Path) -> Iterator[None]:
    """Turns a failure to write a file into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}") from None


class _Progress:
    """A line on the terminal that tells how far something is; nothing where there is none."""

    def __init__(self, name: str) -> None:
        self._name, self._next = name, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty() and time.monotonic() >= self._next:
            print(f"\r{self._name}: {done:,} of {total:,}", end="", file=sys.stderr, flush=True)
            self._next = time.monotonic() + 0.2

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
