"""The parity gate: nothing is exported or imported that does not compute the same.

What was written is read again and compared (self-check), and the library that it is for runs it on
sample images and texts where that library is installed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clip_jax.config import ImageTowerConfig, ModelConfig, UserError, flatten
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.interop.embeddings import embed, own_inputs
from clip_jax.interop.samples import (
    TEXTS,
    TRICKY_TEXTS,
    exact_images,
    other_images,
)
from clip_jax.interop.weights import PARTS, Weights

LIMIT = 1e-5  # of the largest absolute difference of unit-length float32 embeddings

# How a model is trained, but not what it computes; formats need not have it.
_TRAINING = (
    "name",
    "logit_scale_init",
    "logit_scale_max",
    "image.patch_dropout",
    "image.batch_norm",
    "image.batch_norm_group_size",
    "text.token_embedding_std",
)
_STARTS = ("logit_bias_init", "image.layer_scale_init")  # whether there is one is what counts
_NAFLEX_ONLY = ("image.max_num_patches",)
_NOT_NAFLEX = ("image.resize",)
_RESNET_UNUSED = (
    "image.depth",
    "image.mlp_ratio",
    "image.activation",
    "image.layer_norm_epsilon",
    "image.pooling",
    "image.class_token",
    "image.pre_norm",
    "image.patch_bias",
    "image_projection",
)
_TEXT_UNUSED = {
    "transformer": ("text.num_segments", "text.pooler"),
    "bert": ("text.causal",),
    "cbow": (
        "text.causal",
        "text.num_segments",
        "text.pooler",
        "text.depth",
        "text.num_heads",
        "text.mlp_ratio",
        "text.activation",
        "text.layer_norm_epsilon",
    ),
}


class Format(Protocol):
    """A module of this room for one foreign format."""

    def read(self, path: Path) -> Weights: ...

    def write(self, weights: Weights, directory: Path) -> None: ...

    def peer_embeddings(
        self, directory: Path, images: Sequence[Image.Image], texts: Sequence[str]
    ) -> Mapping[str, Any] | None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What an import or export did, and what of it was checked.

    path: what was written. differences: the largest of the embeddings of each tower that the peer
    library ran; empty where it did not run (self-check only).
    """

    format: str
    path: Path
    model: ModelConfig
    parts: tuple[str, ...]
    checks: tuple[str, ...]
    differences: dict[str, float]

    def __str__(self) -> str:
        return "\n".join(
            [f"{self.path}: {self.model.name}", *(f"  {line}" for line in self.checks)]
        )


def check_again(weights: Weights, again: Weights) -> list[str]:
    """Compares what was read back with what was written; says what was compared.

    Raises UserError that names the first difference.
    """
    if weights.parts != again.parts:
        raise UserError(f"read back, {weights.parts} became {again.parts}")
    for path, array in weights.arrays.items():
        other = again.arrays.get(path)
        if other is None:
            raise UserError(f"read back, {path} is missing")
        if (array.dtype, array.shape) != (other.dtype, other.shape):
            raise UserError(
                f"read back, {path} is {other.dtype} {other.shape}, not {array.dtype} {array.shape}"
            )
        if np.ascontiguousarray(array).tobytes() != np.ascontiguousarray(other).tobytes():
            raise UserError(f"read back, {path} has other numbers")
    if surplus := again.arrays.keys() - weights.arrays.keys():
        raise UserError(f"read back, there is {min(surplus)} too")
    ours, theirs = (described(side) for side in (weights, again))
    for name, value in ours.items():
        if theirs[name] != value:
            raise UserError(f"read back, model.{name} is {theirs[name]!r}, not {value!r}")
    size = sum(array.nbytes for array in weights.arrays.values())
    lines = [
        f"self-check: {len(weights.arrays)} arrays ({size / 1e6:.1f} MB) the same byte for byte",
        f"self-check: {_spelled(weights)}",
    ]
    return [*lines, _check_tokenizers(weights, again)] if "text" in weights.parts else lines


def described(weights: Weights) -> dict[str, Any]:
    """The settings that decide what the model computes, by name."""
    model = weights.model
    flat = flatten(model)
    unused = {*_TRAINING, *_TEXT_UNUSED[model.text.kind]}
    unused.update(_NOT_NAFLEX if model.image.kind == "naflex" else _NAFLEX_ONLY)
    if model.image.kind == "resnet":
        unused.update(_RESNET_UNUSED)
    if model.text.kind == "transformer":
        if model.text.causal and model.text.pooling == "eot":
            unused.add("text.pad_id")  # it comes after all that counts
        elif model.text.pooling in ("last", "attention", "class_token"):
            unused.update(("text.pad_id", "text.eot_id"))  # the tokenizer's affair
    for name in _STARTS:
        flat[name] = flat[name] is not None
    for tower in PARTS:
        settings = getattr(model, tower)
        flat[f"{tower}.mlp_ratio"] = round(settings.width * settings.mlp_ratio)
    single = weights.parts != PARTS
    return {
        name: value
        for name, value in flat.items()
        if name not in unused and not (single and name.split(".")[0] not in weights.parts)
    }


def check_peer(
    weights: Weights, directory: Path, module: Format, *, library: str
) -> tuple[list[str], dict[str, float]]:
    """Runs the peer library on `directory` and compares; says what was compared, and how near.

    The first images have the model's own size, so that the towers get the same pixels; the others
    are of other sizes and go through both preprocessings, as texts go through both tokenizers.
    Raises UserError where embeddings differ by more than LIMIT.
    """
    same, other = exact_images(weights.model.image), other_images(weights.model.image)
    images = [*same, *other] if "image" in weights.parts else []
    texts = TEXTS if "text" in weights.parts else ()
    try:
        theirs = module.peer_embeddings(directory, images, list(texts))
    except UserError:
        raise
    except Exception as error:  # whatever goes wrong inside another library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(f"{library} cannot run it: {reason}") from error
    if theirs is None:
        remedy = (
            "is no package" if library == "big_vision" else "cannot be imported (extra: verify)"
        )
        return [f"self-check only: {library} {remedy}"], {}
    ours = embed(weights, own_inputs(weights, images, texts))
    lines, differences = [], {}
    for part in weights.parts:
        rows = theirs.get(part)
        if rows is None or part not in ours:
            lines.append(
                f"{library}: {part} embeddings not compared (it has nothing to run them with)"
            )
            continue
        if rows.shape != ours[part].shape:
            raise UserError(
                f"{library} makes {part} embeddings {rows.shape}, not {ours[part].shape}"
            )
        gaps = np.abs(rows - ours[part]).max(axis=1)
        differences[part] = float(gaps.max())
        if not gaps.max() <= LIMIT:  # NaN too
            raise UserError(_refusal(library, part, gaps, len(same)))
        through = "preprocessing" if part == "image" else "tokenizer"
        lines.append(
            f"{library}: {len(rows)} {part} embeddings, {through} included, differ by "
            f"{gaps.max():.1e} at most (limit {LIMIT:.0e})"
        )
    return lines, differences


def _refusal(library: str, part: str, gaps: NDArray[np.float32], num_same: int) -> str:
    gap = f"the {part} embeddings of {library} differ by {gaps.max():.1e} (limit {LIMIT:.0e})"
    if part == "image" and not gaps[:num_same].max() > LIMIT:
        return (
            f"{gap}, those of the same pixels only by {gaps[:num_same].max():.1e}: it is resizing"
        )
    if part == "text":
        return f"{gap}, first for the text {TEXTS[int(np.argmax(gaps > LIMIT))][:60]!r}"
    return gap


def _spelled(weights: Weights) -> str:
    model, parts = weights.model, []
    for tower in weights.parts:
        settings = getattr(model, tower)
        parts.append(
            f"{tower}: {settings.activation}, epsilon {settings.layer_norm_epsilon:g}, "
            f"pooling {settings.pooling}"
        )
    if "image" in weights.parts:
        parts.append(_preprocessing(model.image))
    return "settings the same (" + "; ".join(parts) + ")"


def _preprocessing(image: ImageTowerConfig) -> str:
    if image.kind == "naflex":
        how = f"at most {image.max_num_patches} patches of {image.patch_size}"
    else:
        how = f"{image.resize} to {image.image_size}"
    mean, std = (", ".join(f"{c:.4g}" for c in channels) for channels in (image.mean, image.std))
    return f"{how} pixels, {image.interpolation}, mean {mean}, std {std}"


def _check_tokenizers(weights: Weights, again: Weights) -> str:
    if weights.tokenizer is None:
        return "no tokenizer came with the weights"
    if again.tokenizer is None:
        return "the format has no place for the tokenizer; keep it beside the weights"
    if difference := _first_difference(weights.tokenizer, again.tokenizer, weights.model):
        raise UserError(f"read back, the tokenizer has other tokens for {difference[:60]!r}")
    return f"self-check: tokenizer the same on {len(TEXTS) + len(TRICKY_TEXTS)} texts"


def _first_difference(ours: Tokenizer, again: Tokenizer, model: ModelConfig) -> str | None:
    length, texts = model.text.context_length, [*TEXTS, *TRICKY_TEXTS]
    rows, others = ours(texts, length), again(texts, length)
    end = ours.eot_id
    for text, row, other in zip(texts, rows, others, strict=True):
        if model.text.pooling == "eot" and model.text.causal and end in row:
            kept = int(np.argmax(row == end)) + 1  # what pads may differ
            row, other = row[:kept], other[:kept]
        if not np.array_equal(row, other):
            return text
    return None
