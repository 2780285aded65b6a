"""How the backend is set up: flags of XLA, and the host's allocator where the CPU is the device.

The one place that sets them. They count if set before the first device is used.
"""

import ctypes
import os
import platform
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h of glibc
_ACCELERATORS = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*", "kfd")  # GPUs, TPUs, AMD's GPUs


def set_xla_flags(*, deterministic: bool, autotuned: Path) -> None:
    """Adds to $XLA_FLAGS what the run asks for; what the user has set there wins.

    deterministic: GPUs run no operation whose result depends on the order in which threads come.
    Kernels differ in their last bits too, so the choice among them is kept in the folder
    `autotuned` and made from it at the next start. CPUs and TPUs need none of it.
    """
    if not deterministic:
        return
    flags = {
        "xla_gpu_exclude_nondeterministic_ops": "true",
        "xla_gpu_per_fusion_autotune_cache_dir": str(autotuned),
        "xla_gpu_experimental_autotune_cache_mode": "AUTOTUNE_CACHE_MODE_UPDATE",
    }
    given = os.environ.get("XLA_FLAGS", "")
    names = {flag.lstrip("-").partition("=")[0] for flag in given.split()}
    added = [f"--{name}={value}" for name, value in flags.items() if name not in names]
    autotuned.mkdir(parents=True, exist_ok=True)
    os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()


def keep_freed_memory() -> bool:
    """Has glibc keep what a train step frees for the next step, where only CPUs compute.

    By default it hands gigabytes back to the system after each step and gets them again, zeroed, a
    page fault per 4 KiB: of ViT-B/32 with 16 pairs 620,000 a step, a sixth of its time. Now none,
    and the process keeps its largest size. False, and nothing is changed, where $MALLOC_* say what
    to do, where there may be accelerators, and under another C library.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    devices = (path for pattern in _ACCELERATORS for path in Path("/dev").glob(pattern))
    only_cpus = platforms == "cpu" or (not platforms and next(devices, None) is None)
    users = any(name.startswith("MALLOC_") for name in os.environ)
    if users or not only_cpus or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # Threads with arenas of their own would keep apart what they freed.
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}
    return all(libc.mallopt(name, value) == 1 for name, value in settings.items())
