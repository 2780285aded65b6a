import json

import pytest
from checkpoint.buckets import Bucket
from small import small_config

from clip_jax.checkpoint import Workdir, drop_metrics_after, read_metrics, write_atomically
from clip_jax.config import ConfigError, UserError


def test_config_round_trips(workdir):
    with pytest.raises(UserError, match="not the workdir of a run"):
        workdir.load_config()
    workdir.save_config(small_config())
    assert workdir.exists()
    assert workdir.load_config() == small_config()
    workdir.config.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        workdir.load_config()


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("bad", ["3", '{"loss": 1}', "{broken", "\ufffd"])
def test_a_bad_line_in_the_middle_is_named_and_nothing_is_lost(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match="line 2 is not a metrics line"):
        drop_metrics_after(path, 1)
    assert path.read_bytes() == before


def test_the_paths_of_a_run_in_a_bucket_read_as_urls():
    workdir = Workdir("gs://bucket/run/")
    assert f"{workdir.path}" == "gs://bucket/run"
    assert f"{workdir.checkpoints}" == "gs://bucket/run/checkpoints"
    assert f"{workdir.bad_samples(3)}" == "gs://bucket/run/bad_samples.3.jsonl"


def test_a_folder_is_made_and_tried(tmp_path):
    Workdir(tmp_path / "a" / "run").check_writable()
    assert list((tmp_path / "a" / "run").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"workdir .*file is a file; name a folder"):
        Workdir(tmp_path / "file").check_writable()
    with pytest.raises(UserError, match=r"cannot be written: Not a directory"):
        Workdir(tmp_path / "file" / "run").check_writable()


def test_a_bucket_is_tried_before_a_run_begins(bucket, monkeypatch):
    with pytest.raises(UserError, match=r"checkpoints are written to local folders and to gs:// a"):
        bucket.check_writable()
    monkeypatch.setattr("clip_jax.checkpoint.workdir._CHECKPOINT_SCHEMES", ("teststore",))
    with (
        Bucket.failing(PermissionError("forbidden")),
        pytest.raises(UserError, match=r"cannot be written: PermissionError: forbidden"),
    ):
        bucket.check_writable()
    bucket.check_writable()
    assert Bucket.objects() == {}
    assert len(Bucket.written) == 1


def test_lines_after_a_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    drop_metrics_after(path, 3)
    assert not path.exists()
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 3, 3, 4)))
    drop_metrics_after(path, 3)
    assert [line["step"] for line in read_metrics(path)] == [1, 3, 3]


def test_atomic_writing_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, None)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
