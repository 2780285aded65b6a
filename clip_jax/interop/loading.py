"""`clip_jax.load`: a model, its preprocessing and its tokenizer, ready for use."""

from pathlib import Path

import jax
from flax import nnx

from clip_jax.checkpoint import Workdir
from clip_jax.config import UserError
from clip_jax.data.preprocess import Preprocess
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.interop.transfer import (
    detect_format,
    format_module,
    weights_of_checkpoint,
    weights_of_workdir,
)
from clip_jax.interop.weights import PARTS, Weights, with_arrays
from clip_jax.models import CLIP, Execution


def load(
    path: str | Path, *, step: int | None = None, ema: bool = False, precision: str = "float32"
) -> tuple[CLIP, Preprocess, Tokenizer | None]:
    """The model at `path`, its preprocessing and its tokenizer (None where the files have none).

    path: the workdir of a run or import, one of its checkpoints, or the folder (or file) of
    open_clip, Hugging Face or big_vision. step and ema: for a workdir, which checkpoint, and the
    moving average of its weights. precision: of the towers' arithmetic, 'float32' or 'bfloat16';
    parameters are float32. The tokenizer's rows have the model's context length, of a BERT the
    tokenizer's own where that is shorter.

    Raises UserError in one line for what cannot be loaded; a single tower is none of it: start a
    run from it with `config.start`.
    """
    weights = _weights_at(Path(path).expanduser(), step=step, ema=ema)
    if weights.parts != PARTS:
        raise UserError(
            f"{path} holds the {weights.parts[0]} tower alone; start a run from it with "
            f"config.start.{weights.parts[0]}"
        )
    execution = Execution.for_backend(
        jax.default_backend(), precision=precision, device=jax.local_devices()[0]
    )
    abstract = jax.eval_shape(
        lambda key: CLIP(weights.model, execution, rngs=nnx.Rngs(key)), jax.random.key(0)
    )
    tokenizer = weights.tokenizer
    if tokenizer is not None:
        length = weights.model.text.context_length
        if weights.model.text.kind == "bert":  # open_clip fills fewer of its positions
            length = min(length, tokenizer.rules.context_length or length)
        tokenizer = tokenizer.with_rules(context_length=length)
    framing = weights.extras.get("framing", "crop")
    model = with_arrays(abstract, weights.arrays)
    return model, Preprocess(weights.model.image, framing), tokenizer


def _weights_at(path: Path, *, step: int | None, ema: bool) -> Weights:
    kind = detect_format(path)
    if kind == "workdir":
        return weights_of_workdir(Workdir(path), step, ema=ema)
    if step is not None or (ema and kind != "checkpoint"):
        raise UserError(f"{path} is not the workdir of a run: it has no steps and no average")
    if kind == "checkpoint":
        return weights_of_checkpoint(path, ema=ema)
    return format_module(kind).read(path)
