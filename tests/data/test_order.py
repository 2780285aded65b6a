import collections
import itertools

import numpy as np
import pytest

from clip_jax.config.errors import UserError
from clip_jax.data.order import Place, SampleOrder, permute


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
    for position in range(5000):
        name, count = order._draw(position)
        assert count == counters[name]
        counters[name] += 1


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
