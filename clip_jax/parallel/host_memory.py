"""Memory of the host: how much there is, and that a CPU's train step keeps what it needs again.

glibc hands large arrays back to the system when they are freed, and a step gets gigabytes anew,
zeroed, a page fault per 4 KiB: of ViT-B/32 with 16 pairs 620,000 a step, a sixth of its time.
Kept, there are hardly any. But pieces of what is kept may be in use when the next step comes: it
can take as much memory a second time, so it is only kept where there is so much. Where accelerators
compute, and where $MALLOC_* say what to do, nothing is changed.
"""

import ctypes
import os
import platform
import resource
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h of glibc
_ACCELERATORS = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*", "kfd")  # GPUs, TPUs, AMD's GPUs
_KEEP = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}  # no piece of its own for what is large; no return
_CGROUP = "sys/fs/cgroup"
_changed: set[int] = set()  # settings of this process


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes: what Linux calls available, or what the container has left where that is less."""
    known = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                known.append(int(line.split()[1]) * 1024)
    except OSError:  # no Linux
        pass
    try:
        most, now = ((root / _CGROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        if most.strip() != "max":
            known.append(int(most) - int(now))
    except OSError:
        pass
    return min(known, default=None)


def use_one_arena() -> bool:
    """Before JAX starts its threads: none frees into a pool of its own, which others cannot use."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    devices = (path for pattern in _ACCELERATORS for path in Path("/dev").glob(pattern))
    only_cpus = platforms == "cpu" or (not platforms and next(devices, None) is None)
    is_set = any(name.startswith("MALLOC_") for name in os.environ)
    if is_set or not only_cpus or platform.libc_ver()[0] != "glibc":
        return False
    if ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1) == 1:
        _changed.add(_M_ARENA_MAX)
    return _M_ARENA_MAX in _changed


def keep_freed_memory() -> bool:
    """After the first step, whose peak says what is needed; False where nothing is changed."""
    if _M_ARENA_MAX not in _changed:
        return False
    available, peak = available_memory(), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if available is None or available < peak:
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(name, value) == 1 for name, value in _KEEP.items())
