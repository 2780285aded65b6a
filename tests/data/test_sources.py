from pathlib import Path

from data.tars import pairs, write_tar

from clip_jax.config.schema import DataConfig, EvalSetConfig, SourceConfig
from clip_jax.data.sources import cache_dir, open_source


def test_webdataset(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(0, 3))
    source = open_source(SourceConfig(path=str(tmp_path / "a.tar")), tmp_path / "cache")
    assert len(source) == 3
    assert (tmp_path / "cache" / "index").is_dir()


def test_quickstart(quickstart_cache):
    config = EvalSetConfig(kind="quickstart", path="unseen_concept")
    assert len(open_source(config, quickstart_cache)) > 100


def test_cache_dir(monkeypatch):
    monkeypatch.delenv("CLIP_JAX_CACHE", raising=False)
    assert cache_dir(DataConfig()) == Path.home() / ".cache" / "clip_jax"
    monkeypatch.setenv("CLIP_JAX_CACHE", "/scratch/cache")
    assert cache_dir(DataConfig()) == Path("/scratch/cache")
    assert cache_dir(DataConfig(cache_dir="~/mine")) == Path.home() / "mine"
