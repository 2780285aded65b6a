"""What is known of this machine: versions, accelerators, memory; imports neither jax nor flax."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from clip_jax.config.errors import UserError
from clip_jax.parallel.host_memory import available_memory

_DISTRIBUTION = "clip-jax-training"
NVIDIA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
TPU_PLUGIN = "libtpu"
# PCI devices of Google's that are TPUs; jax/_src/hardware_utils.py has the same list.
_GOOGLE, _TPUS = "0x1ae0", ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")
_NVIDIA_MODULE = "proc/driver/nvidia/gpus"  # a folder for each, by NVIDIA's kernel module
# In a process of its own: accelerators may be busy, broken, or wait for other hosts.
_ASK = """
import json, jax
devices = jax.devices()
print(json.dumps([devices[0].platform, devices[0].device_kind, len(devices)]))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """Those that JAX computes on here."""

    platform: str  # cpu, gpu or tpu
    device_kind: str
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts. `devices` raises UserError where JAX has none, TimeoutError where it is not heard."""

    devices: Callable[[], Devices]
    requirements: tuple[str, ...] = ()  # of clip_jax, as pip spells them; (): it is not installed
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of what is installed
    num_gpus: int = 0  # NVIDIA's, as the system sees them
    num_tpus: int = 0
    platforms: str = ""  # $JAX_PLATFORMS
    memory_bytes: int | None = None  # that a process here could get now; None: it does not say


class DeviceQuery:
    """Asks JAX for its devices, in another process, from the moment that it is made."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._answer: Devices | Exception | None = None
        # Else a GPU's memory is taken from whoever uses it now.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _ASK],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __call__(self) -> Devices:
        with self._lock:
            if self._answer is None:
                self._answer = self._wait()
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def _wait(self) -> Devices | Exception:
        try:
            out, problem = self._process.communicate(timeout=self._seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return TimeoutError(f"the devices did not answer in {self._seconds:g} s")
        if self._process.returncode:
            last = (problem.strip().splitlines() or ["no reason given"])[-1][:300]
            return UserError(
                f"JAX cannot use its devices: {last}; if another process has them, stop that, else "
                'mend the driver or plugin until python -c "import jax; print(jax.devices())" works'
            )
        platform, kind, count = json.loads(out.strip().splitlines()[-1])
        return Devices(platform=platform, device_kind=kind, count=count)


def look(*, seconds: float, root: Path = Path("/")) -> Machine:
    """This machine. seconds: that JAX has to name its devices. root: where /proc and /sys are."""
    try:
        requirements = tuple(importlib.metadata.requires(_DISTRIBUTION) or ())
    except importlib.metadata.PackageNotFoundError:
        requirements = ()
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements]
    versions = {}
    for name in (*names, "jax", "jaxlib", "flax", *NVIDIA_PLUGINS, TPU_PLUGIN):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name.lower().replace("_", "-")] = importlib.metadata.version(name)
    return Machine(
        devices=DeviceQuery(seconds),
        requirements=requirements,
        versions=versions,
        num_gpus=len(list((root / _NVIDIA_MODULE).glob("*"))),
        num_tpus=_count_tpus(root),
        platforms=os.environ.get("JAX_PLATFORMS", ""),
        memory_bytes=available_memory(root),
    )


def _count_tpus(root: Path) -> int:
    count = 0
    for device in (root / "sys/bus/pci/devices").glob("*"):
        try:
            ids = [(device / name).read_text().strip() for name in ("vendor", "device")]
        except OSError:
            continue
        count += ids[0] == _GOOGLE and ids[1] in _TPUS
    return count
