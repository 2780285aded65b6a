"""Eight simulated devices and caches that the next run finds again."""

import importlib.metadata
import importlib.util
import os
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile more than they compute: without LLVM's optimisations they take two thirds, and
# without the newer emitters half of that. XLA ends a process whose flags it does not know.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jax").startswith("0.10."),
)

import jax
from peers import define_missing_operators

_CACHE = Path(__file__).parents[1] / ".cache"

# By the environment: processes that tests start find it too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "xla-tests"))
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# The emoji set is built once for all tests and kept for the next run.
os.environ.setdefault("CLIP_JAX_CACHE", str(_CACHE / "clip_jax"))

# transformers imports torchvision where it is installed, whichever test comes first.
if importlib.util.find_spec("torchvision") is not None:
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, not ours
        define_missing_operators(torch)
