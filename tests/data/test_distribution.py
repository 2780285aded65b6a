import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clip_jax.data.distribution import Distribution


def filled(values, scale=1):
    distribution = Distribution(scale)
    for value in values:
        distribution.add(value)
    return distribution


@given(st.lists(st.integers(0, 500), min_size=1, max_size=60), st.integers(0, 100))
@example([1, 2], 50)
def test_figures_are_numpys(values, percent):
    distribution = filled(values)
    assert len(distribution) == len(values)
    assert list(distribution) == sorted(values)
    assert distribution.mean == pytest.approx(np.mean(values))
    expected = np.percentile(values, percent, method="inverted_cdf")
    assert distribution.percentile(percent) == expected
    assert (distribution.smallest, distribution.largest) == (min(values), max(values))
    assert distribution.num_below(percent) == sum(value < percent for value in values)
    assert distribution.num_above(percent) == sum(value > percent for value in values)


@given(st.lists(st.integers(3, 10_000), min_size=1, max_size=60), st.integers(1, 40))
def test_bins_hold_every_value_once(values, most):
    bins = filled(values).bins(most)
    assert 1 <= len(bins) <= most
    assert sum(b.num for b in bins) == len(values)
    for b in bins:
        assert b.num == sum(b.low <= value <= b.high for value in values)
    widths = {b.high - b.low for b in bins[:-1]}
    assert len(widths) <= 1


def test_values_are_rounded_to_the_scale():
    ratios = filled([1.004, 1.006, 1.5], scale=100)
    assert list(ratios) == [1.0, 1.01, 1.5]
    assert ratios.num_above(1) == 2


def test_an_empty_one_has_no_figures():
    empty = Distribution()
    assert empty.summary() == {}
    assert empty.bins(5) == []
    with pytest.raises(ValueError, match="no value"):
        _ = empty.mean
    with pytest.raises(ValueError, match="no value"):
        empty.percentile(50)
