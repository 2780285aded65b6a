import os
import subprocess
import sys

from clip_jax.parallel.backend import set_xla_flags


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
