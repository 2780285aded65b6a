import time

import pytest

from clip_jax.training.clock import Clock, split_wait


def test_waits_and_transfers_are_shares_of_a_lap():
    clock = Clock(time.perf_counter(), first_step=3, earlier=50.0)
    with clock.waiting(None):
        time.sleep(0.02)
        with clock.transferring():
            time.sleep(0.02)
    time.sleep(0.04)
    figures = clock.lap(5, local_batch_size=10)
    assert 0 < figures["data_wait/transfer"] < figures["data_wait"] < 1
    assert figures["data/transfer_ms"] >= 20 / (2 * 10)
    assert figures["train_seconds"] > 50
    clock.skip()
    assert clock.lap(6, local_batch_size=10)["data_wait"] == 0


def test_the_wait_is_shared_out_by_work():
    milliseconds = {"read": 1.0, "decode": 6.0, "tokenize": 2.0, "batch": 1.0}
    figures = {f"data/{stage}_ms": ms for stage, ms in milliseconds.items()}
    figures |= {"data_wait": 0.5, "data_wait/transfer": 0.1}
    shares = split_wait(figures)
    assert shares["data_wait/decode"] == pytest.approx(0.4 * 0.6)
    assert sum(shares.values()) + 0.1 == pytest.approx(0.5)
    assert sum(split_wait(dict.fromkeys(figures, 0.0)).values()) == 0
