"""The captions of whole sources, without their images."""

from collections.abc import Iterator, Mapping

from clip_jax.config.errors import UserError
from clip_jax.data.record import Source

_MAX_TOKENIZER_SAMPLES = 200_000  # of a source: the merges of a BPE have long settled by then


def captions(source: Source, name: str) -> list[str]:
    """The first caption of every sample of the evaluation set `name`, in order.

    Raises UserError for a bad sample.
    """
    return [_captions(source, row, name)[0] for row in range(len(source))]


def training_captions(sources: Mapping[str, Source]) -> Iterator[str]:
    """What a tokenizer is trained on: captions of up to 200,000 samples of each source.

    Evenly spread over the source, in the order of the sources' names. Bad samples are passed over:
    the pipeline reports them.
    """
    for name in sorted(sources):
        stride = -(-len(sources[name]) // _MAX_TOKENIZER_SAMPLES)
        for row in range(0, len(sources[name]), stride):
            try:
                yield from sources[name].captions(row)
            except UserError:
                raise
            except (ValueError, OSError):
                continue


def _captions(source: Source, row: int, name: str) -> tuple[str, ...]:
    try:
        return source.captions(row)
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(
            f"bad sample in evaluation set '{name}': {source.locate(row)}: {error}; mend it or "
            "take it out of the set"
        ) from None
