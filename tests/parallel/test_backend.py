import os
import platform
import subprocess
import sys

import pytest

from clip_jax.parallel.backend import keep_freed_memory, set_xla_flags


def test_nothing_is_set_unless_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    set_xla_flags(deterministic=False, autotuned=tmp_path / "autotuned")
    assert os.environ["XLA_FLAGS"] == "--xla_backend_optimization_level=0"
    assert not (tmp_path / "autotuned").exists()


def test_what_the_user_set_wins(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_exclude_nondeterministic_ops=false")
    set_xla_flags(deterministic=True, autotuned=tmp_path)
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[0] == "--xla_gpu_exclude_nondeterministic_ops=false"
    assert f"--xla_gpu_per_fusion_autotune_cache_dir={tmp_path}" in flags
    assert len([flag for flag in flags if "nondeterministic" in flag]) == 1


def test_this_xla_knows_the_flags(tmp_path):
    """It ends the process where it does not."""
    code = (
        "from pathlib import Path; from clip_jax.parallel.backend import set_xla_flags;"
        f"set_xla_flags(deterministic=True, autotuned=Path({str(tmp_path)!r}));"
        "import jax; print(jax.jit(lambda x: x + 1)(1.0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2.0"


FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from clip_jax.parallel.backend import keep_freed_memory

assert keep_freed_memory() is (sys.argv[1] == "kept")
step = jax.jit(lambda x: (jnp.sin(x) @ jnp.cos(x)).sum())
x = jnp.ones((2048, 2048))
for i in range(6):
    if i == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def clean_environment(**changes):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    return environment | {"JAX_PLATFORMS": "cpu"} | changes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator of another kind")
def test_steps_after_the_first_ones_have_no_page_faults():
    faults = {}
    for name, changes in {"kept": {}, "as it is": {"MALLOC_TOP_PAD_": "131072"}}.items():
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, name],
            env=clean_environment(**changes),
            capture_output=True,
            text=True,
            check=True,
        )
        faults[name] = int(done.stdout)
    pages_of_a_step = 2048 * 2048 * 4 // 4096
    assert faults["as it is"] > 3 * pages_of_a_step
    assert faults["kept"] < pages_of_a_step / 10


@pytest.mark.parametrize(
    "changes", [{"MALLOC_ARENA_MAX": "4"}, {"JAX_PLATFORMS": "cuda"}, {"JAX_PLATFORMS": "tpu,cpu"}]
)
def test_the_allocator_is_left_alone(monkeypatch, changes):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert not keep_freed_memory()
