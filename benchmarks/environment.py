"""What a benchmark ran on, for its printed head and its JSON, and how it adds to one."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "open_clip_torch", "transformers")


def environment() -> dict[str, object]:
    """Machine, versions and commit; no host name and no path."""
    import jax

    devices = jax.devices()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": [round(x, 1) for x in os.getloadavg()],
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": _commit(),
    }


def merge_into(path: Path, key: str, name: str, found: dict[str, Any]) -> None:
    """Writes `found` as {key: {name: found}}, beside what other calls have written there."""
    written = json.loads(path.read_text()).get(key, {}) if path.exists() else {}
    path.write_text(json.dumps({key: written | {name: found}}, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit, with a + where the working tree differs from it."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
        return result.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit}+" if git("status", "--porcelain", "--untracked-files=no") else commit
