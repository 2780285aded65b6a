import dataclasses
from types import SimpleNamespace

import jax
import pytest
from small import mesh_of, small_config

from clip_jax.config import LoggingConfig
from clip_jax.tasks import ContrastiveTask
from clip_jax.training import throughput
from clip_jax.training.throughput import (
    Throughput,
    count_chips,
    host_memory_in_use,
    make_throughput,
    measure_peak,
    memory_in_use,
)


def test_rates_and_mfu():
    run = Throughput(
        global_batch_size=100,
        flops_per_sample=3 * 10**9,
        num_chips=4,
        peak_tflops=2.0,
        measured_tflops=1.5,
    )
    # 1000 samples/s x 3 GFLOP = 3 TFLOP/s, of 8 and of 6.
    assert run.figures(10.0) == pytest.approx(
        {
            "samples_per_second": 1000,
            "samples_per_second_per_chip": 250,
            "mfu": 3 / 8,
            "mfu_measured": 3 / 6,
        }
    )
    bare = dataclasses.replace(run, peak_tflops=None, measured_tflops=None)
    assert set(bare.figures(1.0)) == {"samples_per_second", "samples_per_second_per_chip"}


@pytest.mark.parametrize("given", [None, 100.0])
def test_the_peak_is_the_configs_or_the_data_sheets(given):
    config = small_config(logging=LoggingConfig(peak_tflops=given))
    task = ContrastiveTask(config, mesh_of())
    run = make_throughput(config, task)
    assert run.flops_per_sample == task.flops()
    assert run.peak_tflops == given  # a CPU has no data sheet
    assert run.measured_tflops is None
    assert run.num_chips == 1  # its eight simulated devices share it


def test_the_data_sheet_by_precision(monkeypatch):
    """Eight devices that are four chips: TPU7x shows each of its halves."""
    device = SimpleNamespace(device_kind="TPU7x", platform="tpu")
    monkeypatch.setattr(throughput.jax, "local_devices", lambda: [device])
    monkeypatch.setattr(throughput.jax, "default_backend", lambda: "tpu")
    assert count_chips() == jax.device_count() // 2 == 4
    config = small_config(precision="bfloat16", global_batch_size=8)
    task = SimpleNamespace(flops=lambda: 10)
    run = make_throughput(config, task)
    assert (run.num_chips, run.peak_tflops) == (4, 2307)


def test_a_measured_peak_is_a_speed_that_the_host_can_have():
    tflops = measure_peak("float32", size=64)
    assert 1e-6 < tflops < 100
    assert make_throughput_measured() > 1e-6


def make_throughput_measured() -> float:
    config = small_config(logging=LoggingConfig(measure_peak=True))
    original = throughput._size_of_products
    throughput._size_of_products = lambda device, itemsize: 64
    try:
        run = make_throughput(config, SimpleNamespace(flops=lambda: 10))
    finally:
        throughput._size_of_products = original
    assert run.measured_tflops is not None
    assert "mfu_measured" in run.figures(1.0)
    return run.measured_tflops


def test_memory(monkeypatch):
    assert memory_in_use() == {}  # CPUs tell none
    assert 1e7 < host_memory_in_use()["memory/host_peak_bytes"] < 1e12

    def device(used: int, peak: int) -> SimpleNamespace:
        stats = {"bytes_in_use": used, "peak_bytes_in_use": peak, "bytes_limit": 100, "num": 3}
        return SimpleNamespace(memory_stats=lambda: stats)

    monkeypatch.setattr(throughput.jax, "local_devices", lambda: [device(10, 40), device(20, 30)])
    assert memory_in_use() == {
        "memory/bytes_in_use": 20,
        "memory/peak_bytes_in_use": 40,
        "memory/bytes_limit": 100,
    }


@pytest.mark.parametrize(
    ("free", "size"), [(100e9, 8192), (8 * 2 * 8192**2, 8192), (1e9, 4096), (1e6, 1024)]
)
def test_products_fit_into_what_is_left(free, size):
    stats = {"bytes_limit": int(free) + 10**9, "bytes_in_use": 10**9}
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    assert throughput._size_of_products(device, itemsize=2) == size
