import numpy as np

from clip_jax.data.sample_random import SampleRandom


def test_a_stream_depends_on_nothing_before_it():
    random = SampleRandom(3)
    expected = random.at(5).random(4)
    stream = random.at(6)
    stream.integers(9, dtype=np.int32)  # leaves half of a word behind
    stream.random()
    assert (random.at(5).random(4) == expected).all()
    assert (SampleRandom(3).at(5).random(4) == expected).all()


def test_streams_differ():
    draws = {
        tuple(SampleRandom(seed).at(position, attempt).random(2))
        for seed in (0, 1)
        for position in (0, 1, 2**40)
        for attempt in (0, 1, 100)
    }
    assert len(draws) == 18


def test_streams_are_those_of_philox():
    key = np.array([np.random.SeedSequence(3).generate_state(1, np.uint64)[0], 5], np.uint64)
    numpy = np.random.Generator(
        np.random.Philox(key=key, counter=np.array([0, 0, 0, 2], np.uint64))
    )
    ours = SampleRandom(3).at(5, 2)
    assert (ours.random(7) == numpy.random(7)).all()
    assert ours.integers(10**6) == numpy.integers(10**6)


def test_first_draws_of_neighbours_are_uniform():
    random = SampleRandom(0)
    draws = np.array([random.at(position).random() for position in range(10_000)])
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert ((counts - 500) ** 2 / 500).sum() < 19 + 5 * 38**0.5  # chi square, five deviations
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.05
