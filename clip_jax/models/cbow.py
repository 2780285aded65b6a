"""Bag-of-words text tower, as in CLIP's ablation (Radford et al. 2021, section 2.3, figure 2).

Shape suffixes: B batch, T tokens, D width.
"""

import jax
from flax import nnx

from clip_jax.config import TextTowerConfig
from clip_jax.models.execution import Execution
from clip_jax.models.layers import Array, look_up
from clip_jax.models.text import mean_of_real


class BagOfWords(nnx.Module):
    """Tokens [B, T] int32 to the mean embedding of the real ones [B, D] (float32), and all of them.

    The input layer of continuous bag-of-words (Mikolov et al. 2013, section 3.1): order does not
    count. A row without a real token gives zeros, with a finite gradient. T is free.
    """

    def __init__(self, config: TextTowerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.config, self.execution = config, execution
        self.token_embedding = nnx.Param(
            config.token_embedding_std
            * jax.random.normal(rngs.params(), (config.vocab_size, config.width))
        )

    def __call__(self, tokens_BT: Array) -> tuple[Array, Array]:
        # Float32: the mean is all there is to compute.
        x_BTD = look_up(self.token_embedding[...], tokens_BT, self.execution)
        return mean_of_real(x_BTD, tokens_BT, self.config), x_BTD.astype(self.execution.dtype)
