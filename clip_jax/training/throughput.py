"""How fast a run is for what its chips could do: samples and FLOPs per second, MFU, memory."""

import dataclasses
import resource
import sys
import time

import jax
import jax.numpy as jnp

from clip_jax.config import ExperimentConfig
from clip_jax.parallel.chips import chip_of
from clip_jax.tasks import Task

_SECONDS = 0.5  # that the products of a measurement take together, about


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput:
    """Rates of a run, and the share of its chips' peak that they are.

    On CPUs a "chip" is a process: its simulated devices share the cores.
    """

    global_batch_size: int
    flops_per_sample: int  # forward and backward, analytic
    num_chips: int
    peak_tflops: float | None  # of a chip, by its data sheet
    measured_tflops: float | None  # of a chip, by `measure_peak`

    def figures(self, steps_per_second: float) -> dict[str, float]:
        """`mfu` and `mfu_measured` (Chowdhery et al. 2022, appendix B) where the peak is known.

        What rematerialization computes again does not count as work.
        """
        samples = steps_per_second * self.global_batch_size
        figures = {
            "samples_per_second": samples,
            "samples_per_second_per_chip": samples / self.num_chips,
        }
        tflops = samples * self.flops_per_sample / self.num_chips / 1e12
        if self.peak_tflops is not None:
            figures["mfu"] = tflops / self.peak_tflops
        if self.measured_tflops is not None:
            figures["mfu_measured"] = tflops / self.measured_tflops
        return figures


def make_throughput(config: ExperimentConfig, task: Task) -> Throughput:
    """A run and its chips; with `logging.measure_peak` it takes a second or so."""
    logging, device = config.logging, jax.local_devices()[0]
    chip = chip_of(device) if logging.peak_tflops is None else None
    measured = None
    if logging.measure_peak:
        measured = measure_peak(config.precision) * _devices_of_chip(device)
    return Throughput(
        global_batch_size=config.global_batch_size,
        flops_per_sample=task.flops(),
        num_chips=count_chips(),
        peak_tflops=chip.peak_tflops[config.precision] if chip is not None else logging.peak_tflops,
        measured_tflops=measured,
    )


def count_chips() -> int:
    """Chips of all processes; processes where they compute on CPUs."""
    if jax.default_backend() == "cpu":
        return jax.process_count()
    return max(jax.device_count() // _devices_of_chip(jax.local_devices()[0]), 1)


def _devices_of_chip(device: jax.Device) -> int:
    chip = chip_of(device)
    return chip.num_devices if chip is not None else 1


def measure_peak(dtype: str, *, device: jax.Device | None = None, size: int | None = None) -> float:
    """TFLOP/s of large square matrix products on one local device: what it really reaches.

    The best of several chains of products, each of which waits for the one before. size: of the
    matrices; None: 8192, or less where the backend is a CPU or little memory is left.
    """
    device = device or jax.local_devices()[0]
    size = size or _size_of_products(device, jnp.dtype(dtype).itemsize)
    # Products of rows with a matrix of this scale keep their size: nothing overflows.
    key_x, key_w = jax.random.split(jax.random.key(0))
    with jax.default_device(device):
        x = jax.random.normal(key_x, (size, size), dtype)
        w = jax.random.normal(key_w, (size, size), dtype) * jnp.asarray(size**-0.5, dtype)
        product = jax.jit(jnp.matmul)
        jax.block_until_ready(product(product(x, w), w))  # compiled, and its algorithm chosen

        def seconds_of(count: int) -> float:
            start, y = time.perf_counter(), x
            for _ in range(count):
                y = product(y, w)
            jax.block_until_ready(y)
            return time.perf_counter() - start

        repeats = 4
        count = max(round(_SECONDS / repeats / seconds_of(2) * 2), 1)
        best = min(seconds_of(count) for _ in range(repeats)) / count
    return 2 * size**3 / best / 1e12


def _size_of_products(device: jax.Device, itemsize: int) -> int:
    if device.platform == "cpu":
        return 1024
    stats = device.memory_stats() or {}
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    size = 8192
    while stats and size > 1024 and 8 * itemsize * size**2 > free:
        size //= 2
    return size


def memory_in_use() -> dict[str, float]:
    """Bytes of the fullest local device, now and at most so far; {} where the backend has none."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {
        "memory/bytes_in_use": "bytes_in_use",
        "memory/peak_bytes_in_use": "peak_bytes_in_use",
        "memory/bytes_limit": "bytes_limit",
    }
    return {
        name: float(max(each[key] for each in stats))
        for name, key in names.items()
        if all(key in each for each in stats)
    }


def host_memory_in_use() -> dict[str, float]:
    """Bytes of memory that this process held at most; without its worker processes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory/host_peak_bytes": float(peak if sys.platform == "darwin" else 1024 * peak)}
