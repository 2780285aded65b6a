import json

import pytest
from small import small_config

from clip_jax.checkpoint import Workdir, drop_metrics_after, read_metrics, write_atomically
from clip_jax.config import ConfigError, UserError


def test_config_round_trips(tmp_path):
    workdir = Workdir(tmp_path)
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


def test_one_process_at_a_time(tmp_path):
    workdir = Workdir(tmp_path)
    with workdir.lock(), pytest.raises(UserError, match="another process trains in"):
        workdir.lock()
    workdir.lock().close()


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
