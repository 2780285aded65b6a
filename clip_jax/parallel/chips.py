"""What the data sheets say of accelerators: arithmetic, memory and links of one chip.

Sources, read in November 2026 (dense figures: NVIDIA's are halved where they count on sparsity):

- TPUs: the page of each version in Google's Cloud TPU documentation, and the table of v5p, v6e and
  7x on that of TPU7x. Links of a TPU go to its neighbors: what the documentation gives for both
  directions together (v5e 400, v5p 1200, v6e 800, 7x 1200 GB/s) is halved. That of v4 is its
  all-reduce bandwidth per pod by the chips in it: 1.1 PB/s / 4096. FP8 and float32 products run at
  the rate of bfloat16 ones where the chip has no faster unit.
- NVIDIA: the data sheets of A100 (June 2021), H100 (2023), H200 (2024), HGX B200 and GB200 (2025),
  L4, L40S and A10. A10G: that of Amazon's G5 instances. NVLink's figure, for both directions, is
  halved. Networks are those of DGX systems: one adapter of 200 (A100) or 400 Gbit/s for each GPU.
"""

import dataclasses
import functools
import logging
import re
from collections.abc import Mapping
from typing import Literal, Protocol

logger = logging.getLogger(__name__)

Dtype = Literal["bfloat16", "float32", "int8", "float8"]


class HasKind(Protocol):
    """A `jax.Device`, or one of a topology that is compiled for and not there."""

    @property
    def device_kind(self) -> str: ...

    @property
    def platform(self) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator. Bandwidths are bytes per second in one direction."""

    name: str
    kinds: str  # regular expression of `jax.Device.device_kind`
    # Peak dense products by dtype of the operands. float32 as JAX multiplies by default: TF32 on
    # NVIDIA's, one pass of bfloat16 on TPUs.
    peak_tflops: Mapping[Dtype, float]
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float | None  # all ICI links or NVLinks together; None: PCIe alone
    network_bandwidth: float | None  # of the data center, a chip's share; None: by the instance
    num_devices: int = 1  # JAX devices that are one chip


_GB, _GIB = 10**9, 2**30


def _nvidia(
    name: str,
    kinds: str,
    *,
    tflops: tuple[float, float, float, float | None],
    memory: float,
    memory_bandwidth: float,
    nvlink: float | None,
    network: float | None,
) -> Chip:
    """tflops: bfloat16, TF32, int8, float8. memory: GB; nvlink: GB/s both ways; network: Gbit/s."""
    bfloat16, tf32, int8, float8 = tflops
    peaks: dict[Dtype, float] = {"bfloat16": bfloat16, "float32": tf32, "int8": int8}
    if float8 is not None:
        peaks["float8"] = float8
    return Chip(
        name=name,
        kinds=f"NVIDIA {kinds}",
        peak_tflops=peaks,
        memory_bytes=int(memory * _GB),
        memory_bandwidth=memory_bandwidth * _GB,
        link_bandwidth=None if nvlink is None else nvlink / 2 * _GB,
        network_bandwidth=None if network is None else network / 8 * _GB,
    )


def _tpu(
    name: str,
    kinds: str,
    *,
    tflops: tuple[float, float, float],
    memory: float,
    memory_bandwidth: float,
    links: float,
    network: float | None,
    num_devices: int = 1,
) -> Chip:
    """tflops: bfloat16, int8, float8. memory: GiB; links: GB/s one way; network: Gbit/s."""
    bfloat16, int8, float8 = tflops
    return Chip(
        name=name,
        kinds=f"TPU ?{kinds}",
        peak_tflops={"bfloat16": bfloat16, "float32": bfloat16, "int8": int8, "float8": float8},
        memory_bytes=int(memory * _GIB),
        memory_bandwidth=memory_bandwidth * _GB,
        link_bandwidth=links * _GB,
        network_bandwidth=None if network is None else network / 8 * _GB,
        num_devices=num_devices,
    )


# The first whose `kinds` match all of a device kind is taken. Those of TPUs are JAX's own
# (`mesh_utils.py`); v5p is "TPU v5" on some machines, and v5e and v6e are the "lite" ones.
CHIPS: tuple[Chip, ...] = (
    _tpu(
        "TPU v4",
        "v4",
        tflops=(275, 275, 275),
        memory=32,
        memory_bandwidth=1200,
        links=270,
        network=None,
    ),
    _tpu(
        "TPU v5e",
        "v5( lite|e)",
        tflops=(197, 393, 197),
        memory=16,
        memory_bandwidth=819,
        links=200,
        network=25,  # 6.4 Tbit/s for a pod of 256
    ),
    _tpu(
        "TPU v5p",
        "v5p?",
        tflops=(459, 918, 459),
        memory=95,
        memory_bandwidth=2765,
        links=600,
        network=50,
    ),
    _tpu(
        "TPU v6e",
        "v6( lite|e)",
        tflops=(918, 1836, 918),
        memory=32,
        memory_bandwidth=1638,
        links=400,
        network=100,
    ),
    _tpu(
        "TPU7x",
        "7x?",
        tflops=(2307, 2307, 4614),
        memory=192,
        memory_bandwidth=7380,
        links=600,
        network=100,
        num_devices=2,  # each of its two TensorCores, with half of the memory, is a device
    ),
    _nvidia(
        "A100 40GB",
        r"A100-.*-40GB",
        tflops=(312, 156, 624, None),
        memory=40,
        memory_bandwidth=1555,
        nvlink=600,
        network=200,
    ),
    _nvidia(
        "A100 80GB",
        r"A100-SXM.*-80GB",
        tflops=(312, 156, 624, None),
        memory=80,
        memory_bandwidth=2039,
        nvlink=600,
        network=200,
    ),
    _nvidia(
        "A100 80GB PCIe",
        r"A100 80GB PCIe",
        tflops=(312, 156, 624, None),
        memory=80,
        memory_bandwidth=1935,
        nvlink=600,  # between two cards with a bridge
        network=None,
    ),
    _nvidia(
        "H100 SXM",
        r"H100 80GB HBM3",
        tflops=(989.4, 494.7, 1979, 1979),
        memory=80,
        memory_bandwidth=3350,
        nvlink=900,
        network=400,
    ),
    _nvidia(
        "H100 PCIe",
        r"H100 PCIe",
        tflops=(756, 378, 1513, 1513),
        memory=80,
        memory_bandwidth=2000,
        nvlink=600,  # between two cards with a bridge
        network=None,
    ),
    _nvidia(
        "H100 NVL",
        r"H100 NVL",
        tflops=(835.5, 417.5, 1671, 1671),
        memory=94,
        memory_bandwidth=3900,
        nvlink=600,
        network=None,
    ),
    _nvidia(
        "H200",
        r"H200",
        tflops=(989.4, 494.7, 1979, 1979),
        memory=141,
        memory_bandwidth=4800,
        nvlink=900,
        network=400,
    ),
    _nvidia(
        "H200 NVL",
        r"H200 NVL",
        tflops=(835.5, 417.5, 1671, 1671),
        memory=141,
        memory_bandwidth=4800,
        nvlink=900,
        network=None,
    ),
    _nvidia(
        "B200",
        r"B200",
        tflops=(2250, 1125, 4500, 4500),
        memory=180,
        memory_bandwidth=8000,
        nvlink=1800,
        network=400,
    ),
    _nvidia(
        "GB200",
        r"GB200",
        tflops=(2500, 1250, 5000, 5000),
        memory=186,
        memory_bandwidth=8000,
        nvlink=1800,
        network=400,
    ),
    _nvidia(
        "L4",
        r"L4",
        tflops=(121, 60.5, 242.5, 242.5),
        memory=24,
        memory_bandwidth=300,
        nvlink=None,
        network=None,
    ),
    _nvidia(
        "L40S",
        r"L40S",
        tflops=(362, 183, 733, 733),
        memory=48,
        memory_bandwidth=864,
        nvlink=None,
        network=None,
    ),
    _nvidia(
        "A10",
        r"A10",
        tflops=(125, 62.5, 250, None),
        memory=24,
        memory_bandwidth=600,
        nvlink=None,
        network=None,
    ),
    _nvidia(
        "A10G",
        r"A10G",
        tflops=(70, 35, 140, None),
        memory=24,
        memory_bandwidth=600,
        nvlink=None,
        network=None,
    ),
)


def chip_of(device: HasKind) -> Chip | None:
    """The data sheet of a device; None for a CPU, and, said once, for a kind it has none of."""
    if device.platform == "cpu":
        return None
    return _chip_of_kind(device.device_kind)


@functools.cache
def _chip_of_kind(kind: str) -> Chip | None:
    for chip in CHIPS:
        if re.fullmatch(chip.kinds, kind):
            return chip
    logger.warning(
        "no data sheet of %r in parallel/chips.py: its peak is unknown; give "
        "config.logging.peak_tflops, or measure it with config.logging.measure_peak",
        kind,
    )
    return None
