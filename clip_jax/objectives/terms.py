"""What a contrastive loss consists of, and which pairs take part in it.

Shape suffixes: b rows of one device, I image rows of a tile, J text rows of a tile.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Kind = Literal["softmax", "sigmoid"]
Duplicates = Literal["exclude", "positive"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """The choices that are fixed when the loss is compiled."""

    kind: Kind
    beta: float = 0.0  # concentration of the hardness weights; 0: all negatives weigh one
    label_smoothing: float = 0.0
    has_ids: bool = False
    further_positives: bool = False  # duplicates of a pair count as positives of its row

    def __post_init__(self) -> None:
        if self.kind not in ("softmax", "sigmoid"):
            raise ValueError(f"kind {self.kind!r} is not 'softmax' or 'sigmoid'")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta {self.beta} must be 0 (plain loss) or more, and finite")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing {self.label_smoothing} is outside [0, 1)")
        if self.kind == "sigmoid" and self.label_smoothing:
            raise ValueError(
                f"label_smoothing {self.label_smoothing} has no meaning for kind 'sigmoid', "
                "whose pairs are separate yes-or-no questions; use 0"
            )


class Labels(NamedTuple):
    """What tells which pairs are duplicates (equal ids) and which are padding. None: not used."""

    image_ids: Array | None = None  # int32 [b]
    text_ids: Array | None = None  # int32 [b]
    valid: Array | None = None  # bool [b]


class TileLogits(NamedTuple):
    """One tile of logits [I, J], parted into negatives and further positives.

    Pairs that belong to neither (the row's own pair, excluded duplicates, padding, rows that an
    earlier tile has seen) are -inf in both, and so drop out of every exponential.
    """

    negative: Array
    further: Array | None  # None where a row has only its own pair as positive
    scaled_cosine: Array  # the logits without the bias, of all pairs
    is_negative: Array | None  # bool; None: every pair is
    is_further: Array | None


def part(
    terms: Terms, scaled_cosine_IJ: Array, bias: Array | None, rows: Labels, columns: Labels,
    taking_part_IJ: Array | None,
) -> TileLogits:  # fmt: skip
    """The logits of a tile by role. `taking_part_IJ`: False drops a pair; None drops none."""
    logits_IJ = scaled_cosine_IJ if bias is None else scaled_cosine_IJ + bias
    present = taking_part_IJ
    if rows.valid is not None and columns.valid is not None:
        present = _both(present, rows.valid[:, None] & columns.valid[None, :])
    if not terms.has_ids:
        negative_IJ = logits_IJ if present is None else jnp.where(present, logits_IJ, -jnp.inf)
        return TileLogits(negative_IJ, None, scaled_cosine_IJ, present, None)
    duplicate_IJ = jnp.zeros(logits_IJ.shape, bool)
    for ids_I, ids_J in (
        (rows.image_ids, columns.image_ids),
        (rows.text_ids, columns.text_ids),
    ):
        if ids_I is not None and ids_J is not None:
            duplicate_IJ |= ids_I[:, None] == ids_J[None, :]
    is_negative = _both(present, ~duplicate_IJ)
    negative_IJ = jnp.where(is_negative, logits_IJ, -jnp.inf)
    if not terms.further_positives:
        return TileLogits(negative_IJ, None, scaled_cosine_IJ, is_negative, None)
    is_further = _both(present, duplicate_IJ)
    further_IJ = jnp.where(is_further, logits_IJ, -jnp.inf)
    return TileLogits(negative_IJ, further_IJ, scaled_cosine_IJ, is_negative, is_further)


def _both(first: Array | None, second: Array) -> Array:
    return second if first is None else first & second
