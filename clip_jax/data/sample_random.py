"""Random numbers of a sample: a function of the seed, the position and the attempt alone."""

import numpy as np


class SampleRandom:
    """Streams of random numbers, one for each sample of a run; not to be shared between threads.

    Philox (Salmon et al. 2011) is a function of a key, here the seed and the position, and of a
    counter, whose top word is the attempt: streams never overlap. Setting it costs 1 us; a new
    `np.random.default_rng` for each sample costs 10, and holds the lock of the interpreter.
    """

    def __init__(self, seed: int) -> None:
        key = np.array([np.random.SeedSequence(seed).generate_state(1, np.uint64)[0], 0], np.uint64)
        self._bits = np.random.Philox(key=key)
        self._generator = np.random.Generator(self._bits)
        self._fresh = self._bits.state
        self._key = self._fresh["state"]["key"]
        self._counter = self._fresh["state"]["counter"]

    def at(self, position: int, attempt: int = 0) -> np.random.Generator:
        """The stream of a position, from its start. The generator serves until the next call."""
        self._key[1] = position
        self._counter[3] = attempt
        self._bits.state = self._fresh
        return self._generator
