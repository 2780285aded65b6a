"""That freed memory is kept, where it may be."""

import os
import platform
import statistics
import subprocess
import sys

import pytest

from clip_jax.parallel import host_memory

FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from clip_jax.parallel.host_memory import keep_freed_memory, use_one_arena

keeps = sys.argv[1] == "kept"
assert use_one_arena() is keeps
step = jax.jit(lambda x: (jnp.sin(x) @ jnp.cos(x)).sum())
x = jnp.ones((2048, 2048))
counts = []
for i in range(12):
    if i == 1:
        assert keep_freed_memory() is keeps
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*counts)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator of another kind")
def test_steps_after_the_first_ones_have_no_page_faults():
    """The heap grows for a few steps, sometimes for one more later on."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    faults = {}
    for name, changes in {"kept": {}, "as it is": {"MALLOC_TOP_PAD_": "131072"}}.items():
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, name],
            env=clean | {"JAX_PLATFORMS": "cpu"} | changes,
            capture_output=True,
            text=True,
            check=True,
        )
        faults[name] = statistics.median(map(int, done.stdout.split()))
    assert faults["as it is"] > 2048 * 2048 * 4 // 4096
    assert faults["kept"] < faults["as it is"] / 10


@pytest.mark.parametrize(
    "changes", [{"MALLOC_ARENA_MAX": "4"}, {"JAX_PLATFORMS": "cuda"}, {"JAX_PLATFORMS": "tpu,cpu"}]
)
def test_the_allocator_is_left_alone(monkeypatch, changes):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(host_memory, "_changed", set())
    assert not host_memory.use_one_arena()
    assert not host_memory.keep_freed_memory()


def test_nothing_is_kept_where_it_might_not_fit_twice(monkeypatch):
    monkeypatch.setattr(host_memory, "_changed", {host_memory._M_ARENA_MAX})
    monkeypatch.setattr(host_memory, "available_memory", lambda: 2**20)
    assert not host_memory.keep_freed_memory()


def test_what_a_container_has_left_counts(tmp_path):
    assert host_memory.available_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 5 kB\n")
    assert host_memory.available_memory(tmp_path) == 5 * 1024
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.current").write_text("1024\n")
    (cgroup / "memory.max").write_text("max\n")
    assert host_memory.available_memory(tmp_path) == 5 * 1024
    (cgroup / "memory.max").write_text("3072\n")
    assert host_memory.available_memory(tmp_path) == 2048
