import math

import numpy as np
import pytest

from clip_jax.config import StabilityConfig, UserError
from clip_jax.training.stability import LossSpikeError, SpikeDetector, check_skipped

CONFIG = StabilityConfig(spike_zscore=6.0, spike_window=16)


def noisy(num: int) -> list[float]:
    rng = np.random.default_rng(0)
    return (3 + 0.1 * rng.standard_normal(num)).tolist()


def test_the_score_is_robust():
    """A quarter of outliers in the window do not hide the next one."""
    detector = SpikeDetector(CONFIG)
    losses = noisy(16)
    losses[::4] = [30.0] * 4
    for step, loss in enumerate(losses):
        detector.check(step, loss)
    median = np.median(losses)
    deviation = 1.4826 * np.median(np.abs(np.array(losses) - median))
    detector.check(16, float(median + 5.9 * deviation))
    fresh = SpikeDetector(CONFIG, losses)
    with pytest.raises(LossSpikeError) as raised:
        fresh.check(16, float(median + 6.1 * deviation))
    assert raised.value.step == 16
    assert raised.value.zscore == pytest.approx(6.1, rel=1e-5)
    assert fresh.losses == losses  # a spike does not become normal


def test_nothing_is_judged_before_the_window_is_full_or_below_the_median():
    detector = SpikeDetector(CONFIG)
    for step, loss in enumerate([1.0] * 15 + [1e6]):
        detector.check(step, loss)
    detector.check(16, -1e6)


def test_rounding_is_no_spike_and_neither_is_a_skipped_update():
    detector = SpikeDetector(CONFIG, [2.0] * 16)
    detector.check(17, 2.0 + 1e-5)
    detector.check(18, math.nan)
    detector.check(19, math.inf)
    assert len(detector.losses) == 16
    assert all(map(math.isfinite, detector.losses))


def test_off_by_default():
    detector = SpikeDetector(StabilityConfig(), [1.0] * 128)
    detector.check(1, 1e9)


def test_too_many_skipped_updates_end_a_run():
    config = StabilityConfig(max_skipped_steps=3)
    check_skipped(config, 10, 2)
    with pytest.raises(UserError, match=r"last 3 updates up to step 10 .*learning_rate"):
        check_skipped(config, 10, 3)
