import collections
import itertools
from fractions import Fraction

import numpy as np
import pytest

from clip_jax.config.errors import UserError
from clip_jax.data.order import Place, Positions, SampleOrder, permute


def values(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.uint64)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097])
def test_permute_is_a_permutation(length):
    assert sorted(permute(values(length), length, [1, 2]).tolist()) == list(range(length))


def test_permute_of_huge_lengths():
    length = 10**13
    chosen = np.array([0, 1, 10**12, length - 1], np.uint64)
    permuted = permute(chosen, length, [5])
    assert len(set(permuted.tolist())) == 4
    assert permuted.max() < length
    assert (permuted != chosen).any()


@pytest.mark.parametrize("length", [3, 4])
def test_all_permutations_are_as_likely(length):
    trials = 6000
    counts = collections.Counter(
        tuple(permute(values(length), length, [seed]).tolist()) for seed in range(trials)
    )
    orders = list(itertools.permutations(range(length)))
    expected = trials / len(orders)
    chi_square = sum((counts[order] - expected) ** 2 / expected for order in orders)
    freedom = len(orders) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


def test_neighbours_do_not_stay_together():
    permuted = permute(values(10000), 10000, [0]).astype(np.int64)
    assert abs(np.corrcoef(permuted[:-1], permuted[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(10000), permuted)[0, 1]) < 0.05


def test_the_order_never_changes():
    # Golden: a run that was started yesterday goes on with the same samples.
    order = SampleOrder({"a": 100, "b": 7}, {"a": 1.0, "b": 0.5}, seed=3)
    places = order.places([0, 1, 2, 3, 4, 10**9])
    assert [(place.source, place.row) for place in places[:5]] == [
        ("a", 3),
        ("a", 97),
        ("b", 2),
        ("a", 28),
        ("a", 78),
    ]
    assert places[5] == Place("a", 6666666, 22)


def test_every_sample_once_an_epoch():
    order = SampleOrder({"a": 37, "b": 5}, {"a": 2, "b": 1}, seed=0)
    seen = collections.defaultdict(list)
    for place in order.places(range(600)):
        seen[place.source, place.epoch].append(place.row)
    for (source, epoch), rows in seen.items():
        length = {"a": 37, "b": 5}[source]
        assert len(rows) == len(set(rows)) <= length
        if epoch < 600 * {"a": 2, "b": 1}[source] // 3 // length:
            assert len(rows) == length


def test_epochs_seeds_and_sources_have_their_own_shuffles():
    def first_epoch(name="a", seed=0, epoch=0):
        order = SampleOrder({name: 50}, {name: 1}, seed)
        return tuple(place.row for place in order.places(range(50 * epoch, 50 * epoch + 50)))

    orders = {
        first_epoch(),
        first_epoch(epoch=1),
        first_epoch(epoch=2),
        first_epoch(seed=1),
        first_epoch(seed=1, epoch=1),
        first_epoch(name="b"),
    }
    assert len(orders) == 6


@pytest.mark.parametrize("first", [0, 1, 999, 10**15 + 7])
def test_shares_are_exact_over_any_window(first):
    weights = {"a": 0.3, "b": 1.0, "c": 0.1, "d": 0.7}
    order = SampleOrder(dict.fromkeys(weights, 10**6), weights, seed=0)
    counts = collections.Counter(p.source for p in order.places(range(first, first + 21 * 10)))
    assert counts == {"a": 30, "b": 100, "c": 10, "d": 70}


def test_draws_count_up_without_gaps():
    order = SampleOrder({"a": 10**9, "b": 10**9, "c": 10**9}, {"a": 5, "b": 3.3, "c": 0.01}, 0)
    counters = collections.Counter()
    numbers, counts = order._draws(np.arange(5000))
    for position, (number, count) in enumerate(zip(numbers.tolist(), counts.tolist(), strict=True)):
        if position % 500 == 0:
            drawn = order.drawn_before(position)
            assert drawn == {name: counters[index] for index, name in enumerate("abc")}
        assert count == counters[number]
        counters[number] += 1


def test_large_shares_are_exact():
    # The products are beyond 64 bits: the shares are of 10^15.
    order = SampleOrder({"a": 10**9, "b": 10**9}, {"a": 0.123456789012345, "b": 0.4}, seed=0)
    first = 10**12
    before, after = order.drawn_before(first), order.drawn_before(first + 1000)
    counts = collections.Counter(place.source for place in order.places(range(first, first + 1000)))
    assert counts == {name: after[name] - before[name] for name in "ab"}
    exact = Fraction(0.123456789012345) / (Fraction(0.123456789012345) + Fraction(0.4))
    assert abs(before["a"] - first * exact) < 1


@pytest.mark.parametrize("weights", [{"a": 3, "b": 1}, {"a": 1, "b": 0}, {"a": 1, "b": 5}])
def test_first_repeat(weights):
    order = SampleOrder({"a": 20, "b": 9}, weights, seed=1)
    places = order.places(range(40))
    epochs = [place.epoch for place in places]
    assert order.first_repeat() == epochs.index(1)


def test_positions_pass_over_ranges():
    positions = Positions([(7, 9), (3, 5), (4, 6), (9, 10), (20, 20)])
    expected = [p for p in range(30) if p not in {3, 4, 5, 7, 8, 9}]
    assert positions(np.arange(24)).tolist() == expected
    for count, position in enumerate(expected):
        assert positions.consumed_before(position) == count
    assert positions.consumed_before(8) == positions.consumed_before(10) == 4
    assert Positions([(0, 5)])(np.array([0, 2**40])).tolist() == [5, 2**40 + 5]
    assert Positions([])(np.array([0, 7])).tolist() == [0, 7]


def test_positions_may_be_asked_in_any_order():
    order = SampleOrder({"a": 20, "b": 3}, {"a": 1, "b": 1}, seed=9)
    together = order.places(range(100))
    assert [order.places([position])[0] for position in range(100)] == together
    assert order.places([70, 3, 41]) == [together[70], together[3], together[41]]


def test_names_not_their_order_count():
    lengths = {"b": 9, "a": 4}
    one = SampleOrder(lengths, {"a": 1, "b": 2}, seed=0)
    other = SampleOrder(dict(reversed(lengths.items())), {"b": 2, "a": 1}, seed=0)
    assert one.places(range(50)) == other.places(range(50))


def test_weight_zero_switches_a_source_off():
    order = SampleOrder({"a": 4, "b": 4}, {"a": 1, "b": 0}, seed=0)
    assert {place.source for place in order.places(range(50))} == {"a"}


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_none(weight):
    with pytest.raises(UserError, match=f"weight {weight} of data source 'a'"):
        SampleOrder({"a": 4}, {"a": weight}, seed=0)


def test_no_source():
    with pytest.raises(UserError, match="no data source"):
        SampleOrder({}, {}, seed=0)
