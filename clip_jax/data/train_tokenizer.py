"""What `clip-jax tokenizer train` does: a tokenizer from the captions of some sources."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clip_jax.config.errors import UserError
from clip_jax.config.schema import SourceConfig
from clip_jax.data.source_captions import training_captions
from clip_jax.data.sources import open_source
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.data.vocabularies import Kind

_MAX_MEASURED = 10_000  # captions
_LONGEST = 1024  # tokens: longer ones count as so many


@dataclass(frozen=True)
class TrainedTokenizer:
    """A new tokenizer and what there is to say about it."""

    tokenizer: Tokenizer
    output: Path
    num_captions: int  # that it was trained on
    # Of up to 10,000 of them, start and end included; longer ones count as 1,024 tokens.
    tokens_per_caption: float  # mean
    longest_caption: int  # tokens


def train_tokenizer(
    sources: Mapping[str, SourceConfig],
    cache_dir: Path,
    *,
    kind: Kind,
    vocab_size: int,
    lowercase: bool,
    output: Path,
) -> TrainedTokenizer:
    """Train a tokenizer on the captions of some sources and write it to `output`.

    Reads captions of up to 200,000 samples of each source, spread evenly, and skips bad samples.
    cache_dir: of tar indexes. Raises UserError, before anything is read, if `output` is there or
    its folder is not, and for what `Tokenizer.train` and the sources refuse.
    """
    if output.exists():
        raise UserError(f"{output} is there already; name another file or delete it")
    if not output.parent.is_dir():
        raise UserError(f"there is no folder {output.parent}; make it first")
    opened = {name: open_source(source, cache_dir) for name, source in sources.items()}
    captions = list(training_captions(opened))
    tokenizer = Tokenizer.train(captions, vocab_size, lowercase, kind)
    some = captions[:: -(-len(captions) // _MAX_MEASURED)]
    ends = tokenizer(some, _LONGEST) == tokenizer.eot_id
    lengths = 1 + ends.argmax(axis=1)
    tokenizer.save(output)
    return TrainedTokenizer(
        tokenizer, output, len(captions), float(lengths.mean()), int(lengths.max())
    )
