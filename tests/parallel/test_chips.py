import logging
from types import SimpleNamespace

import jax
import pytest

from clip_jax.parallel.chips import CHIPS, chip_of


def device(kind: str, platform: str = "gpu") -> SimpleNamespace:
    return SimpleNamespace(device_kind=kind, platform=platform)


# As drivers and JAX spell them.
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5e", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("TPU7x", "TPU7x"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
    ],
)
def test_device_kinds(kind, name):
    chip = chip_of(device(kind))
    assert chip is not None
    assert chip.name == name


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_the_figures_are_in_their_units(chip):
    # A slip of a thousand, or of bits for bytes, leaves these ranges.
    assert 50 < chip.peak_tflops["bfloat16"] < 5000
    assert chip.peak_tflops["float32"] <= chip.peak_tflops["bfloat16"]
    assert chip.peak_tflops["int8"] >= chip.peak_tflops["bfloat16"]
    assert 15e9 < chip.memory_bytes < 300e9
    assert 2e11 < chip.memory_bandwidth < 1e13
    assert chip.link_bandwidth is None or 1e11 < chip.link_bandwidth <= 9e11
    assert chip.network_bandwidth is None or 3e9 < chip.network_bandwidth <= 5e10


VERSIONS = {"TPU v4": "v4", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v6e": "v6e", "TPU7x": "7x"}


@pytest.mark.parametrize("name", VERSIONS)
def test_tpus_are_those_of_jax(name):
    """JAX has figures of its own for the kernels that it compiles, of one TensorCore each."""
    from jax.experimental.pallas import tpu

    chip = next(chip for chip in CHIPS if chip.name == name)
    version = tpu.ChipVersion(VERSIONS[name])
    info = tpu.get_tpu_info_for_chip(version, 1)
    cores = version.num_physical_tensor_cores_per_chip
    assert chip.peak_tflops["bfloat16"] * 1e12 == pytest.approx(
        cores * info.bf16_ops_per_second, rel=0.01
    )
    assert chip.memory_bytes == pytest.approx(cores * info.hbm_capacity_bytes, rel=0.02)
    # That of v5p is 2,460 GB/s in JAX and 2,765 in the documentation.
    assert chip.memory_bandwidth == pytest.approx(cores * info.mem_bw_bytes_per_second, rel=0.13)


def test_cpus_have_none_and_unknown_ones_are_named_once(caplog):
    assert chip_of(jax.devices()[0]) is None
    with caplog.at_level(logging.WARNING):
        assert chip_of(device("Abacus 9")) is None
        assert chip_of(device("Abacus 9")) is None
    assert [record.getMessage() for record in caplog.records if "Abacus 9" in record.getMessage()]
    assert len(caplog.records) == 1
