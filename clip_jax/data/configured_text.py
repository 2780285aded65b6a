"""How captions become arrays, as a config asks for it."""

from collections.abc import Mapping
from pathlib import Path

from clip_jax.config.errors import UserError
from clip_jax.config.schema import ExperimentConfig
from clip_jax.data.packing import choose_rows, measure_lengths
from clip_jax.data.record import Source
from clip_jax.data.source_captions import training_captions
from clip_jax.data.text_inputs import PackedText, PaddedText
from clip_jax.data.tokenizer_fit import check_fit
from clip_jax.data.tokenizers import Tokenizer


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
            "config.data.packing.rows must be given where sources stream: captions are measured by "
            "random access; `clip-jax data check` on some of the tars says how many"
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
