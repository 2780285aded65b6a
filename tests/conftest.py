"""Eight simulated devices and caches that the next run finds again."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

_CACHE = Path(__file__).parents[1] / ".cache"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(_CACHE / "xla-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# The emoji set is built once for all tests and kept for the next run.
os.environ.setdefault("CLIP_JAX_CACHE", str(_CACHE / "clip_jax"))
