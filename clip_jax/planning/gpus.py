"""GPUs as the CUDA compiler must be told of them where there is none: their figures, as data.

Sources: the architecture papers of A100 (2020), H100 (2022) and Blackwell (2024) and the table of
compute capabilities of NVIDIA's CUDA C++ Programming Guide (limits of a multiprocessor, shared
memory); memory, bandwidth, cache and clock as the driver of each reports them, which XLA keeps in
`xla/backends/gpu/target_config/specs`. What a program is decided by is mostly the first line:
which kernels and instructions there are, and how many multiprocessors.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU. Sizes are bytes."""

    device_kind: str  # as JAX names it; `parallel.chips` knows it
    compute_capability: int  # its first number; the second is 0
    num_multiprocessors: int
    num_lanes: int  # float32 units of a multiprocessor
    shared_memory: int  # of a multiprocessor
    shared_memory_optin: int  # of a block that asks for it
    l2_cache: int
    clock_ghz: float
    memory: int  # that programs can have, of which JAX takes a share
    memory_bandwidth: int  # bytes per second

    def target_config(self) -> str:
        """The text of XLA's GpuTargetConfigProto. The limits are the same for all of these."""
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_memory}
  shared_memory_per_block_optin: {self.shared_memory_optin}
  core_count: {self.num_multiprocessors} fpus_per_core: {self.num_lanes}
  l2_cache_size: {self.l2_cache} clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory} memory_bandwidth: {self.memory_bandwidth}
  cuda_compute_capability {{ major: {self.compute_capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.device_kind}"
"""


_AMPERE = Gpu(
    device_kind="NVIDIA A100-SXM4-80GB",
    compute_capability=8,
    num_multiprocessors=108,
    num_lanes=64,
    shared_memory=164 * 1024,
    shared_memory_optin=163 * 1024,
    l2_cache=40 * 2**20,
    clock_ghz=1.41,
    memory=85_100_068_864,
    memory_bandwidth=2_039_040_000_000,
)
_HOPPER = Gpu(
    device_kind="NVIDIA H100 80GB HBM3",
    compute_capability=9,
    num_multiprocessors=132,
    num_lanes=128,
    shared_memory=228 * 1024,
    shared_memory_optin=227 * 1024,
    l2_cache=50 * 2**20,
    clock_ghz=1.98,
    memory=84_929_347_584,
    memory_bandwidth=3_352_320_000_000,
)

# By the names that topologies are spelled with.
GPUS: dict[str, Gpu] = {
    "a100": _AMPERE,
    "a100-40gb": dataclasses.replace(
        _AMPERE,
        device_kind="NVIDIA A100-SXM4-40GB",
        memory=42_331_013_120,
        memory_bandwidth=1_555_200_000_000,
    ),
    "h100": _HOPPER,
    "h200": dataclasses.replace(
        _HOPPER,
        device_kind="NVIDIA H200",
        memory=150_110_011_392,
        memory_bandwidth=4_800_000_000_000,
    ),
    "b200": dataclasses.replace(
        _HOPPER,
        device_kind="NVIDIA B200",
        compute_capability=10,
        num_multiprocessors=148,
        l2_cache=132_644_864,
        clock_ghz=1.965,
        memory=191_514_411_008,
        memory_bandwidth=7_672_320_000_000,
    ),
}
