"""Flags of XLA: the one place that sets them. They count if set before the first device is used."""

import os
from pathlib import Path


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
