"""Whether a tokenizer and a text tower belong together."""

from clip_jax.config.errors import ConfigError
from clip_jax.config.schema import TextTowerConfig
from clip_jax.data.tokenizers import Tokenizer


def check_fit(tokenizer: Tokenizer, text: TextTowerConfig) -> None:
    """Raises ConfigError where the tower would take the tokenizer's rows for something else.

    That is: a token beyond the embedding table; another end of text; another padding where the
    tower looks at it. What a tower does not look at may differ: the padding behind the end of text
    is nothing to a causal Transformer, nor to one that masks it.
    """
    if tokenizer.vocab_size > text.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but config.model.text.vocab_size is "
            f"{text.vocab_size}: its embedding table is too small; set vocab_size to "
            f"{tokenizer.vocab_size} or more, or take the tokenizer that the weights came with"
        )
    finds_end = text.kind != "transformer" or text.pooling in ("eot", "mean")
    both = tokenizer.eot_id is not None and text.eot_id is not None
    if tokenizer.eot_id != text.eot_id and (finds_end or both):
        raise ConfigError(
            f"the tokenizer's end of text is {_token(tokenizer.eot_id)}, but "
            f"config.model.text.eot_id is {text.eot_id}"
        )
    before_padding = text.causal and text.pooling in ("eot", "class_token", "mean")
    sees_padding = text.kind == "transformer" and not before_padding
    if tokenizer.pad_id != text.pad_id and (sees_padding or text.eot_id is None):
        raise ConfigError(
            f"the tokenizer pads with token {tokenizer.pad_id}, but config.model.text.pad_id is "
            f"{text.pad_id}, and this text tower sees padding"
        )


def _token(number: int | None) -> str:
    return "missing" if number is None else f"token {number}"
