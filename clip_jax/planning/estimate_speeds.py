"""What is assumed of hardware that is not measured: shares of the data sheets' peaks, latencies.

`assumptions` of an estimate names those that it used. Of these shares one was measured, the rate of
products on an H200 (docs/telemetry.md); the others are round numbers of the order that vendors' own
benchmarks reach, to be replaced where a calibration or a run is at hand.
"""

import dataclasses
from collections.abc import Mapping

from clip_jax.config.errors import UserError
from clip_jax.parallel.chips import Chip, Dtype
from clip_jax.planning.calibration import Calibration
from clip_jax.planning.traffic import Work

# Where the operands' dtype has no rate of its own in a data sheet, the next one that is computed.
_DTYPES: dict[str, tuple[Dtype, ...]] = {
    "bf16": ("bfloat16",),
    "f16": ("bfloat16",),
    "f32": ("float32",),
    "f32 exact": ("float32",),
    "f64": ("float32",),
    "s32": ("float32",),
    "u32": ("float32",),
    "s8": ("int8",),
    "u8": ("int8",),
    "s4": ("int8",),
    "u4": ("int8",),
    "pred": ("bfloat16",),  # TPUs look words up by products with ones and zeros
    "f8e4m3fn": ("float8", "bfloat16"),
    "f8e5m2": ("float8", "bfloat16"),
}
# Full float32: six bfloat16 passes on TPUs (XLA's `highest`); without Tensor Cores, 19.5 of 156
# TFLOP/s on an A100 and 67 of 495 on an H100 (their data sheets).
_EXACT = {"tpu": 1 / 6, "gpu": 1 / 8, "cpu": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """Of the data sheet's figures, what a step reaches; seconds that come on top."""

    products: float
    memory: float
    links: float
    host: float  # of a chip's own PCIe 4.0 x16: chips of a host may share its lanes and memory
    kernel_seconds: float  # of each instruction, whatever it does
    # Of each run of a collective, by link, and for each hop.
    link_seconds: Mapping[str, float]


_NO_WAIT = {"ICI": 0.0, "NVLink": 0.0, "PCIe": 0.0, "DCN": 0.0, "memory": 0.0}
_LINK_SECONDS = {"ICI": 1e-6, "NVLink": 10e-6, "PCIe": 20e-6, "DCN": 50e-6, "memory": 0.0}

PEAK = Shares(products=1, memory=1, links=1, host=1, kernel_seconds=0, link_seconds=_NO_WAIT)
EXPECTED: Mapping[str, Shares] = {
    "tpu": Shares(
        products=0.85,
        memory=0.85,
        links=0.85,
        host=0.5,
        kernel_seconds=0.5e-6,
        link_seconds=_LINK_SECONDS,
    ),
    "gpu": Shares(
        products=0.75,
        memory=0.85,
        links=0.8,
        host=0.5,
        kernel_seconds=3e-6,
        link_seconds=_LINK_SECONDS,
    ),
}
SLOW: Mapping[str, Shares] = {
    "tpu": Shares(
        products=0.65,
        memory=0.7,
        links=0.6,
        host=0.25,
        kernel_seconds=1e-6,
        link_seconds=_LINK_SECONDS,
    ),
    "gpu": Shares(
        products=0.55,
        memory=0.7,
        links=0.55,
        host=0.25,
        kernel_seconds=5e-6,
        link_seconds=_LINK_SECONDS,
    ),
}
SOURCES = {
    "tpu": (
        "assumed, as no TPU was measured: products reach 85% of the peak, memory and links 85% of "
        "their bandwidth, at worst 65%, 70% and 60%; a fusion takes 0.5 us beside its work, a hop "
        "1 us, a message between slices 50 us for each doubling of their number"
    ),
    "gpu": (
        "products reach 75% of the peak (an H200 made 790 of 989 TFLOP/s in large ones); assumed: "
        "memory 85% and links 80% of their bandwidth, at worst 55%, 70% and 55%; a kernel takes 3 "
        "us beside its work, a collective 10 us, between nodes 50 us for each doubling of their "
        "number"
    ),
}
# Of a core, where nothing was measured: AVX2 at 2.5 GHz, and a share of two channels of DDR4.
_CORE_FLOPS, _MEMORY = 40e9, 10e9
HOST_BANDWIDTH = 32e9  # PCIe 4.0 x16 of a device to its host's memory, one direction
# A calibrated estimate is to be within 25% (the goal of benchmarks/plan_accuracy.py).
CALIBRATED_RANGE, GUESSED_RANGE = 1.25, 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speeds:
    """What one device does in a second, as a step is timed with."""

    flops: Mapping[str, float]  # by dtype as a program's text spells it
    memory: float  # bytes
    kernel_seconds: float = 0.0

    def seconds(self, work: Work) -> float:
        """The longer of computing and moving: both go on at once."""
        return max(self.computing(work), self.moving(work)) + self.kernel_seconds

    def computing(self, work: Work) -> float:
        return sum(flops / self.flops[dtype] for dtype, flops in work.flops.items())

    def moving(self, work: Work) -> float:
        return work.num_bytes / self.memory


def chip_speeds(chip: Chip, platform: str, shares: Shares) -> Speeds:
    """Of one device of a chip."""
    flops = {}
    for dtype, names in _DTYPES.items():
        peak = next(chip.peak_tflops[name] for name in names if name in chip.peak_tflops)
        exact = _EXACT[platform] if dtype == "f32 exact" else 1.0
        flops[dtype] = peak * 1e12 * exact * shares.products / chip.num_devices
    return Speeds(
        flops=flops,
        memory=chip.memory_bandwidth * shares.memory / chip.num_devices,
        kernel_seconds=shares.kernel_seconds,
    )


def guessed_speeds(*, num_cores: int, sharing: int) -> Speeds:
    """Of one of the `sharing` simulated devices of a CPU of which nothing is known."""
    rate = _CORE_FLOPS * num_cores / sharing
    return Speeds(flops=dict.fromkeys(_DTYPES, rate), memory=_MEMORY / sharing)


def calibrated_speeds(calibration: Calibration, *, sharing: int) -> Speeds:
    """Of one device, or of one of the `sharing` simulated ones of a CPU."""
    measured = calibration.matmul_flops
    flops = {}
    for dtype, names in _DTYPES.items():
        rate = measured.get(names[0], measured["float32"]) / (calibration.products_factor or 1.0)
        exact = _EXACT[calibration.platform] if dtype == "f32 exact" else 1.0
        flops[dtype] = rate * exact / sharing
    return Speeds(
        flops=flops,
        memory=calibration.memory_bandwidth / (calibration.memory_factor or 1.0) / sharing,
        kernel_seconds=calibration.seconds_per_instruction,
    )


def check_dtypes(flops: Mapping[str, int]) -> None:
    """Raises UserError for products whose rate is not known."""
    unknown = [dtype for dtype in flops if dtype not in _DTYPES]
    if unknown:
        raise UserError(f"the program multiplies {unknown[0]}, of which no rate is known")
