"""Topologies by name: what is spelled, what is refused, and what a mesh is made of."""

import importlib.util
import re

import jax
import pytest

from clip_jax.config import UserError
from clip_jax.parallel.chips import CHIPS
from clip_jax.planning.gpus import GPUS
from clip_jax.planning.topology import (
    Topology,
    open_topology,
    parse_topology,
    preallocated,
    prepare,
)


@pytest.mark.parametrize(
    ("text", "name", "platform", "kind", "shape", "num_slices"),
    [
        ("v4:2x2x2", "v4:2x2x2", "tpu", "v4", (2, 2, 2), 1),
        ("v5e:4x4*2", "v5e:4x4*2", "tpu", "v5e", (4, 4), 2),
        ("v5e:4x4*1", "v5e:4x4", "tpu", "v5e", (4, 4), 1),
        ("v5p:16x20x28", "v5p:16x20x28", "tpu", "v5p", (16, 20, 28), 1),
        ("V6E:16x16", "v6e:16x16", "tpu", "v6e", (16, 16), 1),
        ("tpu7x:2x2x1", "7x:2x2x1", "tpu", "7x", (2, 2, 1), 1),
        ("v7x:2x2x2", "7x:2x2x2", "tpu", "7x", (2, 2, 2), 1),
        ("v5e:1x1", "v5e:1x1", "tpu", "v5e", (1, 1), 1),
        ("h100x8", "h100x8", "gpu", "h100", (8,), 1),
        ("h100x8*4", "h100x8*4", "gpu", "h100", (8,), 4),
        ("a100-40gbx4", "a100-40gbx4", "gpu", "a100-40gb", (4,), 1),
        ("b200", "b200x1", "gpu", "b200", (1,), 1),
        (" cpu:8 ", "cpu:8", "cpu", "cpu", (8,), 1),
    ],
)
def test_every_spelling(text, name, platform, kind, shape, num_slices):
    wanted = parse_topology(text)
    assert (wanted.name, wanted.platform, wanted.kind) == (name, platform, kind)
    assert (wanted.shape, wanted.num_slices) == (shape, num_slices)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:2x2", r"no topology 'v9:2x2'; there are v4:2x2x2, .*h100x8.* and cpu:8"),
        ("v5e", "no topology 'v5e'; there are"),
        ("v5e:4x4x4", r"a slice of v5e has 2 sides, and 'v5e:4x4x4' has 3; as in v5e:4x4"),
        ("v5litepod-16", "'v5litepod-16' is spelled by its sides here: v5e:4x4$"),
        ("v6e-8", "'v6e-8' is spelled by its sides here: v6e:2x4$"),
        ("v5e:1x4", r"'v5e:1x4': the first two sides of a slice are even, .*: v5e:1x1$"),
        ("v5e:3x3", "the first two sides of a slice are even"),
        ("v4:1x2x2", "the first two sides of a slice are even, .*: v4:1x1x1$"),
        ("v5p:3x3x3", "the first two sides of a slice are even"),
        ("v5p:4x4", "a slice of v5p has 3 sides"),
        ("v5e:0x4", "has 0 chips; at least one"),
        (
            "v5e:32x32",
            r"a slice of v5e has at most 16 chips along a side, and 'v5e:32x32' has 32; "
            r"v5e:16x16\*4 is 4 slices",
        ),
        ("v6e:8x17*2", r"at most 16 chips .* has 17; v6e:8x16\*4 is 4 slices"),
        ("v4:4x4x28", r"at most 24 chips .* v4:4x4x24\*2 is 2 slices"),
        ("h100x8*0", "has 0 chips"),
        ("cpu:99999999", "has 99,999,999 chips; at least one, at most 16,384"),
    ],
)
def test_what_there_is_not_is_refused_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        parse_topology(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "extra"), [("v5e:2x2", "plan-tpu"), ("h100x8", "plan-cuda")])
def test_a_missing_compiler_is_named_with_its_remedy(monkeypatch, text, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = re.escape(f"pip install 'clip-jax-training[{extra}]'")
    with pytest.raises(UserError, match=message):
        open_topology(text)


def test_simulated_devices_are_a_topology():
    topology = open_topology("cpu:2")
    assert topology.devices == tuple(jax.devices()[:2])
    assert (topology.num_devices, topology.num_chips, topology.num_hosts) == (2, 2, 1)
    assert topology.memory_bytes is None
    assert topology.usable_bytes is None


def test_more_simulated_devices_than_jax_has_started_with_are_refused():
    jax.devices()
    with pytest.raises(UserError, match="has started with 8 CPU devices; cpu:64 needs a process"):
        prepare(parse_topology("cpu:64"))


@pytest.mark.parametrize("name", GPUS)
def test_gpus_are_described_as_their_data_sheets_say(name):
    """The compiler's description and parallel/chips.py are of the same GPU."""
    gpu = GPUS[name]
    (chip,) = [chip for chip in CHIPS if re.fullmatch(chip.kinds, gpu.device_kind)]
    assert gpu.memory == pytest.approx(chip.memory_bytes, rel=0.08)  # 80 "GB" are up to 80 GiB
    assert gpu.memory_bandwidth == pytest.approx(chip.memory_bandwidth, rel=0.05)
    # Fused multiply-adds of all lanes at the highest clock: the float32 rate without TF32.
    tflops = 2 * gpu.num_multiprocessors * gpu.num_lanes * gpu.clock_ghz / 1e3
    assert tflops == pytest.approx({8: 19.5, 9: 67, 10: 74}[gpu.compute_capability], rel=0.02)
    text = gpu.target_config()
    assert f'device_description_str: "{gpu.device_kind}"' in text
    assert text.count("{") == text.count("}")


def test_of_a_gpu_a_program_may_take_the_share_that_jax_takes(monkeypatch):
    topology = Topology(
        name="h100x1",
        platform="gpu",
        devices=(),
        chip=None,
        num_hosts=1,
        num_slices=1,
        memory_bytes=1000,
    )
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    assert topology.usable_bytes == 750
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    assert topology.usable_bytes == 900
    for nonsense in ("most", "0", "1.5", "nan"):
        monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", nonsense)
        with pytest.raises(UserError, match=f"XLA_CLIENT_MEM_FRACTION={nonsense} is no share"):
            preallocated()
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # its name until jaxlib 0.10
    assert topology.usable_bytes == 500
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    with pytest.raises(UserError, match="are both set; unset the first"):
        preallocated()


# ---- With the compilers ----------------------------------------------------------------------

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu: the extra plan-tpu"
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="no plugin: the extra plan-cuda"
)


@needs_libtpu
@pytest.mark.parametrize(
    ("text", "devices", "chips", "hosts", "chip", "gib"),
    [
        ("v4:2x2x2", 8, 8, 2, "TPU v4", 30.75),  # megacore: a device for a chip's two cores
        ("v5e:1x1", 1, 1, 1, "TPU v5e", 15.75),
        ("v5e:2x4", 8, 8, 1, "TPU v5e", 15.75),
        ("v5e:16x16", 256, 256, 64, "TPU v5e", 15.75),
        ("v5e:4x4*2", 32, 32, 8, "TPU v5e", 15.75),
        ("v5p:4x4x4", 64, 64, 16, "TPU v5p", 95.74),
        ("v6e:4x4", 16, 16, 4, "TPU v6e", 31.25),
        ("7x:2x2x2", 16, 8, 2, "TPU7x", 94.75),
    ],
)
def test_slices_of_tpus(text, devices, chips, hosts, chip, gib):
    topology = open_topology(text)
    assert (topology.num_devices, topology.num_chips) == (devices, chips)
    assert topology.num_hosts == hosts
    assert topology.chip is not None
    assert topology.chip.name == chip
    assert topology.usable_bytes == pytest.approx(gib * 2**30, rel=0.01)


@needs_cuda
def test_nodes_of_gpus():
    topology = open_topology("h100x8*2")
    assert (topology.num_devices, topology.num_hosts, topology.num_slices) == (16, 2, 2)
    assert topology.chip is not None
    assert topology.chip.name == "H100 SXM"
