"""What must hold of any weights before they are used or written."""

import dataclasses

from clip_jax.config import (
    DataConfig,
    ExperimentConfig,
    LossConfig,
    SourceConfig,
    TokenizerConfig,
    UserError,
    validate,
)
from clip_jax.interop.weights import PARTS, Weights


def checked(weights: Weights, source: str) -> Weights:
    """`weights` as they are. Raises UserError, which names `source`, where they are no model.

    That is: settings that the config allows together, and a tokenizer that fits the text tower.
    """
    model, tokenizer = weights.model, weights.tokenizer
    if weights.parts == PARTS:
        # A run of that model, with data that nothing looks at.
        sources = {"any": SourceConfig(path="any")}
        data = DataConfig(sources=sources, tokenizer=TokenizerConfig(kind="file", path="any"))
        loss = LossConfig(kind="softmax" if model.logit_bias_init is None else "sigmoid")
        try:
            validate(dataclasses.replace(ExperimentConfig(), model=model, data=data, loss=loss))
        except UserError as error:
            raise UserError(f"{source}: {str(error).replace('config.model.', 'model.')}") from None
    if tokenizer is not None and "text" in weights.parts:
        if tokenizer.vocab_size > model.text.vocab_size:
            raise UserError(
                f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, but the embedding "
                f"table only {model.text.vocab_size} rows"
            )
        if model.text.pooling == "eot" and tokenizer.eot_id != model.text.eot_id:
            raise UserError(
                f"{source}: the tokenizer ends a text with token {tokenizer.eot_id}, but the model "
                f"looks for {model.text.eot_id}"
            )
    return weights
