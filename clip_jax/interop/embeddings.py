"""Our own embeddings of weights as they are, in float32: one side of the parity gate.

Shape suffixes: B rows, E embedding width, D tower width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray
from PIL import Image

from clip_jax.data.preprocess import Preprocess
from clip_jax.interop.table import NdArray
from clip_jax.interop.weights import PARTS, Weights, with_arrays
from clip_jax.models import CLIP, unit_length

Inputs = Mapping[str, Any]


def embed(weights: Weights, inputs: Inputs) -> dict[str, NDArray[np.float32]]:
    """Unit-length float32 [B, E] of 'image' and 'text', as far as `inputs` has them.

    inputs: as `CLIP.encode_image` and `encode_text` take them. Of a single tower the pooled
    features, [B, D], take the place of embeddings.
    """
    abstract = jax.eval_shape(
        lambda key: CLIP(weights.model, rngs=nnx.Rngs(key)), jax.random.key(0)
    )
    result = {}
    for part, keys in (("image", ("image", "patches")), ("text", ("tokens",))):
        if part not in weights.parts or not any(key in inputs for key in keys):
            continue
        tower = abstract if weights.parts == PARTS else getattr(abstract, part)
        prefix = "" if weights.parts == PARTS else f"{part}/"
        arrays = {
            path.removeprefix(prefix): array
            for path, array in weights.arrays.items()
            if path.startswith(prefix)
        }
        run = jax.jit(_encode, static_argnames="part")
        with jax.default_matmul_precision("highest"):
            rows = run(with_arrays(tower, arrays), dict(inputs), part=part)
        result[part] = np.asarray(rows)
    return result


def own_inputs(
    weights: Weights, images: Sequence[Image.Image], texts: Sequence[str]
) -> dict[str, NdArray]:
    """Images and texts through our preprocessing and tokenizer, as far as there are towers."""
    inputs: dict[str, NdArray] = {}
    if "image" in weights.parts and images:
        inputs |= Preprocess(weights.model.image)(images)
    if "text" in weights.parts and weights.tokenizer is not None and texts:
        lengths = (weights.model.text.context_length, weights.tokenizer.rules.context_length)
        # A tower may have more positions than its library fills: BERT's 512 in open_clip.
        inputs["tokens"] = weights.tokenizer(texts, min(filter(None, lengths)))
    return inputs


def _encode(model: nnx.Module, inputs: Inputs, *, part: str) -> jax.Array:
    if isinstance(model, CLIP):
        return model.encode_image(inputs) if part == "image" else model.encode_text(inputs)
    tower: Any = model
    if part == "text":
        pooled_BD, _ = tower(inputs["tokens"])
    elif "patches" in inputs:
        pooled_BD, _ = tower(inputs["patches"], inputs["patch_mask"], inputs["spatial_shapes"])
    else:
        pooled_BD, _ = tower(inputs["image"])
    return unit_length(pooled_BD)
