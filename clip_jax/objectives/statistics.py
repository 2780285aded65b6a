"""What the loss must know of each image row, and of each text column, over the global batch.

Summed up tile by tile (`summarize`), joined in any order (`merge`), and turned into the row's
loss and into the coefficients of its gradient once every column has been seen (`finish`).

Shape suffixes: b rows of one device, I image rows of a tile, J text rows of a tile. A "row" is an
image's row of logits or a text's column: both are treated alike.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from clip_jax.objectives.terms import Array, Terms, TileLogits

# Largest logit of a row that has none. Finite, so that the difference of two of them is 0.
_NO_LOGIT = -1e30

# Of a cosine of one: several times the rounding of a float32 product 1,024 wide.
_TIE = 2.0**-18


class Sums(NamedTuple):
    """Over the negatives of each row, or over its further positives. l is the logit.

    softmax: `total` sums e = exp(p (l - largest)), p = 1 + beta for negatives and 1 for positives.
    sigmoid: `total` sums h softplus(l), h = exp(beta (l - largest)) (positives: softplus(-l)).
    `slope` is the sum whose logit gradients, times the scale, make the gradient of the scale.
    """

    largest: Array
    total: Array
    slope: Array
    hardness: Array | None = None  # sum of exp(beta (l - largest))
    cosine_sum: Array | None = None  # of the logits without the bias
    num_pairs: Array | None = None  # float32: exact to 16 million


class Statistics(NamedTuple):
    negatives: Sums
    further: Sums | None = None


class Coefficients(NamedTuple):
    """What turns a logit l into its gradient, of each row; the pair's weight is inside.

    A negative's is factor exp(power (l - shift)), for a sigmoid times sigmoid(l). The shift is the
    row's largest logit and not its log-sum-exp, whose rounding at scale 100 would be an error of
    4e-6 in every gradient of the row.
    """

    factor: Array
    shift: Array | None = None  # None: the exponential is 1 (sigmoid without beta)
    further_factor: Array | None = None  # likewise of a further positive
    further_shift: Array | None = None
    pull: Array | None = None  # share of each positive in the target
    uniform: Array | None = None  # share of every candidate in the target: label smoothing


class Outcome(NamedTuple):
    """A row's part of the loss. All [b]; loss, slope and diagonal carry the pair's weight."""

    loss: Array
    slope: Array  # d loss / d log(logit_scale)
    diagonal: Array  # d loss / d logit of the row's own pair
    right: Array  # bool: its best positive is above every negative
    coefficients: Coefficients


def _needs_count(terms: Terms, is_column: bool) -> bool:
    # Duplicates are mutual, so a row's counts are also its column's: they need not travel.
    return terms.has_ids and not is_column


def _needs_cosines(terms: Terms, is_column: bool) -> bool:
    # One side's are enough for the mean similarities.
    return bool(terms.label_smoothing) or not is_column


def nothing(terms: Terms, num_rows: int, *, is_column: bool) -> Statistics:
    """Statistics before the first tile."""

    def zeros() -> Array:
        return jnp.zeros(num_rows, jnp.float32)

    def none() -> Array:
        return jnp.full(num_rows, _NO_LOGIT, jnp.float32)

    count = _needs_count(terms, is_column)
    negatives = Sums(
        none(),
        zeros(),
        zeros(),
        hardness=zeros() if terms.beta else None,
        cosine_sum=zeros() if _needs_cosines(terms, is_column) else None,
        num_pairs=zeros() if count else None,
    )
    further = None
    if terms.further_positives:
        further = Sums(
            none(), zeros(), zeros(), cosine_sum=zeros(), num_pairs=zeros() if count else None
        )
    return Statistics(negatives, further)


def summarize(terms: Terms, tile: TileLogits, *, is_column: bool) -> Statistics:
    """The statistics of one tile's rows or columns."""
    axis = 0 if is_column else 1
    counts = _needs_count(terms, is_column)

    def reduce(values_IJ: Array, mask_IJ: Array | None = None) -> Array:
        if mask_IJ is not None:
            values_IJ = jnp.where(mask_IJ, values_IJ, 0)
        return values_IJ.sum(axis)

    def largest(logits_IJ: Array) -> tuple[Array, Array]:
        top = jnp.maximum(logits_IJ.max(axis), _NO_LOGIT)
        return top, logits_IJ - jnp.expand_dims(top, axis)

    def count(mask_IJ: Array) -> Array:
        return mask_IJ.sum(axis, dtype=jnp.float32)

    cosine_IJ = tile.scaled_cosine
    top, below_IJ = largest(tile.negative)
    if terms.kind == "softmax":
        term_IJ = jnp.exp((1 + terms.beta) * below_IJ)
        slope_IJ = term_IJ * cosine_IJ
    else:
        hardness_IJ = jnp.exp(terms.beta * below_IJ) if terms.beta else 1.0
        term_IJ = hardness_IJ * jax.nn.softplus(tile.negative)
        slope_IJ = hardness_IJ * jax.nn.sigmoid(tile.negative) * cosine_IJ
    negatives = Sums(
        top,
        reduce(term_IJ),
        reduce(slope_IJ),
        reduce(jnp.exp(terms.beta * below_IJ)) if terms.beta else None,
        reduce(cosine_IJ, tile.is_negative) if _needs_cosines(terms, is_column) else None,
        count(tile.is_negative) if counts and tile.is_negative is not None else None,
    )
    if tile.further is None or tile.is_further is None:
        return Statistics(negatives)
    top, below_IJ = largest(tile.further)
    if terms.kind == "softmax":
        term_IJ = jnp.exp(below_IJ)
        slope_IJ = term_IJ * cosine_IJ
    else:
        term_IJ = jnp.where(tile.is_further, jax.nn.softplus(-tile.further), 0)
        slope_IJ = jnp.where(tile.is_further, jax.nn.sigmoid(-tile.further) * cosine_IJ, 0)
    further = Sums(
        top,
        reduce(term_IJ),
        reduce(slope_IJ),
        None,
        reduce(cosine_IJ, tile.is_further),
        count(tile.is_further) if counts else None,
    )
    return Statistics(negatives, further)


def merge(terms: Terms, first: Statistics, second: Statistics) -> Statistics:
    """The statistics of the columns of both."""
    softmax = terms.kind == "softmax"
    negatives = _merge(
        first.negatives, second.negatives, 1 + terms.beta if softmax else terms.beta, terms.beta
    )
    if first.further is None or second.further is None:
        return Statistics(negatives)
    return Statistics(negatives, _merge(first.further, second.further, float(softmax), 0.0))


def _merge(first: Sums, second: Sums, power: float, beta: float) -> Sums:
    top = jnp.maximum(first.largest, second.largest)

    def add(a: Array | None, b: Array | None, power: float = 0.0) -> Array | None:
        if a is None or b is None:
            return None
        if not power:
            return a + b
        rescaled_a = a * jnp.exp(power * (first.largest - top))
        return rescaled_a + b * jnp.exp(power * (second.largest - top))

    total, slope = add(first.total, second.total, power), add(first.slope, second.slope, power)
    assert total is not None
    assert slope is not None
    return Sums(
        top,
        total,
        slope,
        add(first.hardness, second.hardness, beta),
        add(first.cosine_sum, second.cosine_sum),
        add(first.num_pairs, second.num_pairs),
    )


def finish(
    terms: Terms,
    statistics: Statistics,
    own_cosine_b: Array,
    bias: Array | None,
    weights_b: Array | None,
    num_negatives_b: Array,
    num_further_b: Array | None,
) -> Outcome:
    """The rows' losses and coefficients from statistics over the whole global batch.

    own_cosine_b: scaled cosine of each row's own pair, the positive that is always there.
    """
    negatives, further = statistics
    own_b = own_cosine_b if bias is None else own_cosine_b + bias
    weight_b = jnp.ones_like(own_b) if weights_b is None else weights_b
    best_b = own_b if further is None else jnp.maximum(own_b, further.largest)
    # The own logit comes out of another product than the rest: a tie may be off by its rounding.
    right_b = best_b - negatives.largest > _TIE * jnp.abs(own_cosine_b)
    num_positives_b = jnp.ones_like(own_b) if num_further_b is None else 1 + num_further_b
    # Scales the sums of hardness-weighted terms so that a row's weights have mean one.
    log_hardness_b = jnp.zeros_like(own_b)
    if negatives.hardness is not None:
        log_hardness_b = jnp.log(num_negatives_b) - jnp.log(negatives.hardness)
    if terms.kind == "softmax":
        loss_b, slope_b, diagonal_b, coefficients = _finish_softmax(
            terms, statistics, own_b, weight_b, num_negatives_b, num_positives_b, log_hardness_b
        )
    else:
        loss_b, slope_b, diagonal_b, coefficients = _finish_sigmoid(
            terms, statistics, own_b, own_cosine_b, weight_b, num_positives_b, log_hardness_b
        )
    return Outcome(
        weight_b * loss_b, weight_b * slope_b, weight_b * diagonal_b, right_b, coefficients
    )


def _finish_softmax(
    terms: Terms,
    statistics: Statistics,
    own_b: Array,
    weight_b: Array,
    num_negatives_b: Array,
    num_positives_b: Array,
    log_hardness_b: Array,
) -> tuple[Array, Array, Array, Coefficients]:
    negatives, further = statistics
    # Logs of sums over candidates, each less the own logit: -log p(own) = softplus(gap) keeps the
    # digits that log-sum-exp less the own logit loses.
    negatives_b = _log_sum_less(negatives, own_b) + log_hardness_b
    negatives_b = jnp.where(negatives.total == 0, -jnp.inf, negatives_b)
    gap_b = negatives_b
    if further is not None:
        further_b = _log_sum_less(further, own_b)
        gap_b = jnp.logaddexp(negatives_b, further_b)
    loss_b = jax.nn.softplus(gap_b)
    diagonal_b = -jax.nn.sigmoid(gap_b)
    share_b = -diagonal_b if further is None else jnp.exp(negatives_b - loss_b)
    factor_b = share_b / _not_zero(negatives.total)
    slope_b = factor_b * negatives.slope
    coefficients = Coefficients(factor=weight_b * factor_b, shift=negatives.largest)
    pull_b = (1 - terms.label_smoothing) / num_positives_b
    uniform_b = terms.label_smoothing / (num_positives_b + num_negatives_b)
    further_cosine_b = candidates_b = jnp.zeros_like(own_b)
    if further is not None:
        assert further.cosine_sum is not None
        further_cosine_b = candidates_b = further.cosine_sum
        factor_b = jnp.exp(further_b - loss_b) / _not_zero(further.total)
        slope_b += factor_b * further.slope
        coefficients = coefficients._replace(
            further_factor=weight_b * factor_b,
            further_shift=further.largest,
            pull=weight_b * pull_b,
        )
    if terms.label_smoothing:
        assert negatives.cosine_sum is not None
        candidates_b = further_cosine_b + negatives.cosine_sum
        coefficients = coefficients._replace(uniform=weight_b * uniform_b)
    if further is not None or terms.label_smoothing:
        rest_b = 1 - pull_b - uniform_b  # of the target, for the others than the own pair
        others_b = pull_b * further_cosine_b + uniform_b * candidates_b
        loss_b += rest_b * own_b - others_b
        diagonal_b += rest_b
        slope_b -= others_b
    return loss_b, slope_b + diagonal_b * own_b, diagonal_b, coefficients


def _finish_sigmoid(
    terms: Terms,
    statistics: Statistics,
    own_b: Array,
    own_cosine_b: Array,
    weight_b: Array,
    num_positives_b: Array,
    log_hardness_b: Array,
) -> tuple[Array, Array, Array, Coefficients]:
    negatives, further = statistics
    factor_b, shift_b = jnp.ones_like(own_b), None
    if negatives.hardness is not None:
        factor_b = jnp.where(negatives.hardness == 0, 0.0, jnp.exp(log_hardness_b))
        shift_b = negatives.largest
    coefficients = Coefficients(factor=weight_b * factor_b, shift=shift_b)
    pull_b = 1 / num_positives_b
    positive_loss_b = jax.nn.softplus(-own_b)
    diagonal_b = -pull_b * jax.nn.sigmoid(-own_b)
    slope_b = factor_b * negatives.slope + diagonal_b * own_cosine_b
    if further is not None:
        positive_loss_b += further.total
        slope_b -= pull_b * further.slope
        coefficients = coefficients._replace(pull=weight_b * pull_b)
    loss_b = factor_b * negatives.total + pull_b * positive_loss_b
    return loss_b, slope_b, diagonal_b, coefficients


def tile_gradient(
    terms: Terms, tile: TileLogits, rows: Coefficients, columns: Coefficients
) -> Array:
    """d loss / d logit of the tile's pairs [I, J]; 0 where a pair takes no part."""

    def both(of_I: Array | None, of_J: Array | None) -> Array:
        assert of_I is not None
        assert of_J is not None
        return of_I[:, None] + of_J[None, :]

    def one(logits_IJ: Array, power: float, factor: Array | None, shift: Array | None) -> Array:
        assert factor is not None
        return factor if shift is None else factor * jnp.exp(power * (logits_IJ - shift))

    softmax = terms.kind == "softmax"
    power = 1 + terms.beta if softmax else terms.beta
    row_I1 = jax.tree.map(lambda c: c[:, None], rows)
    column_1J = jax.tree.map(lambda c: c[None, :], columns)
    gradient_IJ = one(tile.negative, power, row_I1.factor, row_I1.shift)
    gradient_IJ += one(tile.negative, power, column_1J.factor, column_1J.shift)
    if not softmax:
        gradient_IJ *= jax.nn.sigmoid(tile.negative)
    if terms.label_smoothing:
        uniform_IJ = both(rows.uniform, columns.uniform)
        if tile.is_negative is not None:
            uniform_IJ = jnp.where(tile.is_negative, uniform_IJ, 0)
        gradient_IJ -= uniform_IJ
    if tile.further is None or tile.is_further is None:
        return gradient_IJ
    pull_IJ = both(rows.pull, columns.pull)
    if softmax:
        further_IJ = one(tile.further, 1.0, row_I1.further_factor, row_I1.further_shift)
        further_IJ += one(tile.further, 1.0, column_1J.further_factor, column_1J.further_shift)
        further_IJ -= pull_IJ
        if terms.label_smoothing:
            further_IJ -= both(rows.uniform, columns.uniform)
    else:
        further_IJ = -pull_IJ * jax.nn.sigmoid(-tile.further)
    return gradient_IJ + jnp.where(tile.is_further, further_IJ, 0)


def _log_sum_less(sums: Sums, own_b: Array) -> Array:
    """log of the sum of exp(l - own); -inf of none."""
    # For hardness-weighted negatives beta x largest is left out here and in their normaliser.
    return (sums.largest - own_b) + jnp.log(sums.total)


def _not_zero(total_b: Array) -> Array:
    return jnp.where(total_b == 0, 1.0, total_b)
