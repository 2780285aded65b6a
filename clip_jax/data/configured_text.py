"""How captions become arrays, as a config asks for it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from clip_jax.config.errors import UserError
from clip_jax.config.packing import choose_group_size
from clip_jax.config.schema import ExperimentConfig, PackingConfig
from clip_jax.data.packing import choose_rows, measure_lengths, measure_streamed_lengths
from clip_jax.data.record import Source
from clip_jax.data.source_captions import training_captions
from clip_jax.data.text_inputs import PackedText, PaddedText
from clip_jax.data.tokenizer_fit import check_fit
from clip_jax.data.tokenizers import Tokenizer

_MOST_ROWS = 0.9  # of a group, as a share of it: else there is little to save


def configured_tokenizer(
    config: ExperimentConfig, sources: Mapping[str, Source], saved: Path | None = None
) -> Tokenizer:
    """The one of a run, where `saved` is its file, else that of `config.data.tokenizer`.

    sources: whose captions one of kind 'bpe' is trained on; none where they stream. Raises
    UserError where a file does not load, and for 'bpe' without sources.
    """
    settings = config.data.tokenizer
    if saved is not None and saved.exists():
        return Tokenizer.load(saved)
    if settings.kind == "file":
        return Tokenizer.load(Path(settings.path), lowercase=settings.lowercase)
    if settings.kind == "clip":
        return Tokenizer.clip()
    if not sources:
        raise UserError(
            "config.data.tokenizer.kind 'bpe' is trained by random access, and the sources stream: "
            "train it on some of the tars with `clip-jax tokenizer train` and set kind=file"
        )
    return Tokenizer.train(
        training_captions(sources),
        vocab_size=config.model.text.vocab_size,
        lowercase=settings.lowercase,
    )


def choose_packing(
    config: ExperimentConfig,
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    *,
    num_devices: int = 1,
) -> PackingConfig:
    """`config.data.packing` with all of it chosen; what is given stays.

    num_devices: those that share the batch (data x fsdp). sources: none where they stream. Group
    size 0 where it is not given and packing would not be exact or save a tenth of the rows. Raises
    UserError as `packing_rows` and the measurement do.
    """
    packing = config.data.packing
    if packing.group_size is not None:
        return dataclasses.replace(packing, rows=packing_rows(config, sources, tokenizer))
    group = choose_group_size(config, num_devices)
    if not group:
        return PackingConfig(group_size=0)
    length = config.model.text.context_length
    if sources:
        lengths = measure_lengths(config.data, sources, tokenizer, context_length=length)
    else:
        lengths = measure_streamed_lengths(config.data, tokenizer, context_length=length)
    rows = choose_rows(lengths, group, length)
    if rows > _MOST_ROWS * group:
        return PackingConfig(group_size=0)
    return PackingConfig(group_size=group, rows=rows)


def packing_rows(
    config: ExperimentConfig, sources: Mapping[str, Source], tokenizer: Tokenizer
) -> int | None:
    """`config.data.packing.rows`, chosen from captions if not given; None without packing.

    sources: none where they stream. Raises UserError where rows would have to be measured then.
    """
    packing = config.data.packing
    if not packing.group_size or packing.rows is not None:
        return packing.rows
    if not sources:
        raise UserError(
            "config.data.packing.rows must be given where sources stream and group_size is: "
            "`clip-jax data check` on some of the tars says how many; without both they are chosen"
        )
    length = config.model.text.context_length
    lengths = measure_lengths(config.data, sources, tokenizer, context_length=length)
    return choose_rows(lengths, packing.group_size, length)


def configured_text(
    config: ExperimentConfig, sources: Mapping[str, Source], tokenizer: Tokenizer
) -> PaddedText | PackedText:
    """What makes the text part of a batch.

    Raises UserError where the tokenizer does not fit the text tower, and as `packing_rows` does.
    """
    check_fit(tokenizer, config.model.text)
    length, packing = config.model.text.context_length, config.data.packing
    rows = packing_rows(config, sources, tokenizer)
    if not packing.group_size or rows is None:
        return PaddedText(tokenizer, length)
    return PackedText(tokenizer, length, packing.group_size, rows)
