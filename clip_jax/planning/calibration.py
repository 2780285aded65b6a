"""How fast this machine really is: measured once, kept, and read by later estimates.

First the rate of large products by dtype and the bandwidth of memory, the best of several tries.
Then three train steps, wide, narrow and tiny, in which products, memory and the mere number of
instructions weigh differently: how many times its roofline each of the first two takes in a step,
and what each instruction takes beside its work, are fitted to their times.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clip_jax.config import ExperimentConfig, UserError
from clip_jax.planning.hlo import Program
from clip_jax.planning.traffic import Reader, Work

if TYPE_CHECKING:
    from clip_jax.planning.topology import Topology

logger = logging.getLogger(__name__)

_PACKAGES = ("jax", "jaxlib")
_FOLDER = "calibration"  # of the cache
_DTYPES = ("float32", "bfloat16")
_COPY_BYTES = 2**28  # of one array; no cache holds it
_NUM_COPIES, _NUM_STEPS = 10, 9
_NUM_ROUNDS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What one device reaches; of a CPU, all cores.

    Simulated devices share those. How well depends on how many they are, so each number of them is
    measured by itself.
    """

    platform: str  # "cpu" | "gpu" | "tpu"
    device_kind: str  # as JAX names it; of a CPU, as the machine does
    num_cores: int  # of a CPU
    num_devices: int  # that the steps ran on
    matmul_flops: Mapping[str, float]  # per second, by dtype: large square products
    memory_bandwidth: float  # bytes per second, read and written
    products_factor: float  # time of a step's products, by these rates
    memory_factor: float  # time of what moves more than it computes, by this bandwidth
    seconds_per_instruction: float  # what each executed instruction takes beside its work
    versions: Mapping[str, str]  # of what was measured with

    def describe(self) -> str:
        """`float32 products 93 GFLOP/s, ...`."""
        products = ", ".join(
            f"{dtype} products {flops / 1e9:.0f} GFLOP/s"
            for dtype, flops in self.matmul_flops.items()
        )
        return (
            f"{products}, memory {self.memory_bandwidth / 1e9:.1f} GB/s; in a train step products "
            f"take {self.products_factor:.2f} x and memory {self.memory_factor:.2f} x as long, an "
            f"instruction {1e6 * self.seconds_per_instruction:.1f} us more"
        )


def calibrate(topology: "Topology") -> Calibration:
    """Measured in half a minute or so: rates on the first device, steps on all of them.

    Raises UserError where the devices are compiled for alone.
    """
    import jax

    from clip_jax.planning.calibration_steps import RunningStep
    from clip_jax.training.throughput import measure_peak

    device = topology.devices[0]
    if device not in jax.devices():
        raise UserError(
            f"{topology.name} cannot be measured: its devices are not here; this process has "
            f"{len(jax.devices())} of {jax.devices()[0].device_kind}"
        )
    flops = {dtype: _best_peak(measure_peak, dtype, device) for dtype in _DTYPES}
    bandwidth = _measure_bandwidth(device)
    on_cpu = topology.platform == "cpu"
    rough = Calibration(
        platform=topology.platform,
        device_kind=_device_kind(device),
        num_cores=num_cores() if on_cpu else 0,
        num_devices=topology.num_devices,
        matmul_flops=flops,
        memory_bandwidth=bandwidth,
        products_factor=1.0,
        memory_factor=1.0,
        seconds_per_instruction=0.0,
        versions=_versions(),
    )
    timings = []
    for config in _configs(topology.num_devices, on_cpu=on_cpu):
        step = RunningStep(config, topology.devices)
        step.start()
        step.run()
        # Of the faster half, as others on the machine make some steps slower.
        fastest = sorted(step.run() for _ in range(_NUM_STEPS))[: _NUM_STEPS // 2 + 1]
        seconds = statistics.median(fastest)
        timings.append(Timing(seconds, tuple(Reader(Program(step.text)).work())))
        logger.info("%s: %.4g s", config.name, seconds)
    return fit(rough, timings)


@dataclasses.dataclass(frozen=True)
class Timing:
    """A step that was timed: its work, and how often each part of it runs."""

    seconds: float
    work: tuple[tuple[Work, int], ...]


def fit(rough: Calibration, timings: Sequence[Timing]) -> Calibration:
    """The factors and the overhead, none below zero, that explain the steps best.

    Errors count by their share of a step's time.
    """
    from clip_jax.planning.estimate_speeds import calibrated_speeds

    found = rough
    sharing = rough.num_devices if rough.platform == "cpu" else 1
    for _ in range(_NUM_ROUNDS):
        # Which instructions are products' depends on the factors.
        now = calibrated_speeds(found, sharing=sharing)
        at_peak = calibrated_speeds(rough, sharing=sharing)
        rows = []
        for timing in timings:
            products = memory = count = 0.0
            for work, times in timing.work:
                count += times
                if now.computing(work) > now.moving(work):
                    products += times * at_peak.computing(work)
                else:
                    memory += times * at_peak.moving(work)
            rows.append([value / timing.seconds for value in (products, memory, count)])
        products, memory, overhead = _least_squares(np.array(rows))
        found = dataclasses.replace(
            rough,
            products_factor=products,
            memory_factor=memory,
            seconds_per_instruction=overhead,
        )
    return found


def _least_squares(rows: NDArray[np.float64]) -> tuple[float, ...]:
    """What of each column adds up to 1 in each row as nearly as it can; none below zero."""
    num_columns = rows.shape[1]
    best, least = (0.0,) * num_columns, float(len(rows))
    # With three columns all choices of those that count at all can be tried.
    for kept in itertools.product((False, True), repeat=num_columns):
        solution = np.zeros(num_columns)
        columns = np.array(kept)
        if columns.any():
            solution[columns] = np.linalg.lstsq(rows[:, columns], np.ones(len(rows)))[0]
        error = float(((rows @ solution - 1) ** 2).sum())
        if (solution >= 0).all() and error < least:
            best, least = tuple(map(float, solution)), error
    return best


def _configs(num_devices: int, *, on_cpu: bool) -> list[ExperimentConfig]:
    """Wide, narrow, tiny."""
    from clip_jax.planning.calibration_steps import vit_config

    def rows(batch: int) -> int:
        """Of all devices: on CPUs they share a batch, so that it takes no longer than on one."""
        return -(-batch // num_devices) * num_devices if on_cpu else batch * num_devices

    if on_cpu:  # a second and less on two cores
        wide = vit_config(width=768, depth=1, batch=rows(8), vocab_size=8192)
        narrow = vit_config(width=128, depth=3, batch=rows(16), vocab_size=8192)
    else:
        wide = vit_config(width=1024, depth=12, batch=rows(128), precision="bfloat16")
        narrow = vit_config(width=384, depth=12, batch=rows(256), precision="bfloat16")
    tiny = vit_config(
        width=64,
        depth=4,
        batch=rows(4),
        image_size=32,
        vocab_size=512,
        precision=wide.precision,
    )
    return [wide, narrow, tiny]


def save_calibration(calibration: Calibration, cache: Path) -> Path:
    """Written to a folder of the cache; the file."""
    path = _path(
        cache,
        calibration.platform,
        calibration.device_kind,
        calibration.num_cores,
        calibration.num_devices,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(calibration), indent=1) + "\n"
    # Another process may be reading it.
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)
    return path


def load_calibration(topology: "Topology", cache: Path) -> Calibration | None:
    """That of the kind of device, as many of them and these versions of JAX, where one was made.

    Of one device where there is none of as many.
    """
    cores = num_cores() if topology.platform == "cpu" else 0
    kind = _device_kind(topology.devices[0])
    for num_devices in dict.fromkeys((topology.num_devices, 1)):
        path = _path(cache, topology.platform, kind, cores, num_devices)
        if not path.exists():
            continue
        try:
            found = _parsed(path.read_text())
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s is damaged: measure again with --calibrate: %s", path, error)
            continue
        if found.versions == _versions():
            return found
        logger.warning(
            "%s was measured with %s: measure again with --calibrate", path, found.versions
        )
    return None


def _parsed(text: str) -> Calibration:
    """Raises ValueError or TypeError where it is not what `save_calibration` writes now."""
    found = Calibration(**json.loads(text))
    numbers = [
        found.memory_bandwidth,
        *(found.matmul_flops[dtype] for dtype in _DTYPES if dtype in found.matmul_flops),
    ]
    factors = [found.products_factor, found.memory_factor, found.seconds_per_instruction]
    if len(numbers) < 1 + len(_DTYPES) or min(numbers) <= 0 or min(factors) < 0:
        raise ValueError("a rate is missing, or not above 0")
    return found


def _path(cache: Path, platform_name: str, kind: str, num_cores: int, num_devices: int) -> Path:
    digest = hashlib.sha256(f"{kind} {num_cores}".encode()).hexdigest()[:12]
    return cache / _FOLDER / f"{platform_name}-{digest}-{num_devices}.json"


def _best_peak(measure_peak: Any, dtype: str, device: Any) -> float:
    return float(max(measure_peak(dtype, device=device) for _ in range(2)) * 1e12)


def _measure_bandwidth(device: Any) -> float:
    """Bytes read and written per second by x + 1."""
    import jax
    import jax.numpy as jnp

    with jax.default_device(device):
        x = jnp.ones(_COPY_BYTES // 4, jnp.float32)
        add = jax.jit(lambda x: x + 1, donate_argnums=0)
        x = jax.block_until_ready(add(x))
        best = float("inf")
        for _ in range(_NUM_COPIES):
            started = time.perf_counter()
            x = jax.block_until_ready(add(x))
            best = min(best, time.perf_counter() - started)
    return 2 * _COPY_BYTES / best


def _device_kind(device: Any) -> str:
    if device.platform != "cpu":
        return str(device.device_kind)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def num_cores() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
