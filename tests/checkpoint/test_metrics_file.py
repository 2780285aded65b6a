import json
import threading

import pytest
from checkpoint.buckets import Bucket

from clip_jax.checkpoint import (
    BadSamplesFile,
    MetricsFile,
    Workdir,
    drop_bad_samples_after,
    drop_metrics_after,
    metrics_file,
    read_metrics,
    uploads,
)
from clip_jax.config import UserError

HOUR = 3600.0  # never within a test


def _write(workdir, first_step, steps, **fields):
    file = MetricsFile(workdir, first_step, HOUR)
    for step in steps:
        file.write({"step": step, **fields})
    file.close()


def _steps(workdir):
    return [line["step"] for line in read_metrics(workdir)]


def test_lines_of_several_calls_are_read_in_order(workdir):
    assert read_metrics(workdir) == []
    _write(workdir, 0, [8, 9, 10])
    _write(workdir, 10, [10, 11])
    _write(workdir, 1_000_000_000, [1_000_000_001])
    assert _steps(workdir) == [8, 9, 10, 10, 11, 1_000_000_001]
    assert read_metrics(workdir.metrics) == read_metrics(workdir)


def test_a_disk_has_one_file_that_grows_by_the_line(tmp_path):
    workdir = Workdir(tmp_path)
    file = MetricsFile(workdir, 0, HOUR)
    assert workdir.metrics.exists()
    file.write({"step": 1, "loss": 0.5})
    assert workdir.metrics.read_text() == '{"step": 1, "loss": 0.5}\n'
    file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_bucket_has_the_lines_before_a_flush_after_a_crash(bucket):
    file = MetricsFile(bucket, 5, HOUR)
    assert Bucket.objects() == {}
    file.write({"step": 6})
    file.flush()
    file.write({"step": 7})
    assert Bucket.objects() == {"metrics-000000005.jsonl": '{"step": 6}\n'}
    file.flush()
    file.flush()  # nothing is new
    assert [name for name, _ in Bucket.written] == ["metrics-000000005.jsonl"] * 2
    assert _steps(bucket) == [6, 7]
    file.close()
    assert len(Bucket.written) == 2


def test_lines_are_uploaded_by_and_by(bucket, monkeypatch):
    stored, write = threading.Event(), Bucket.pipe_file

    def watched(*args, **kwargs):
        write(*args, **kwargs)
        stored.set()

    monkeypatch.setattr(Bucket, "pipe_file", watched)
    file = MetricsFile(bucket, 0, 0.01)
    file.write({"step": 1})
    assert stored.wait(60)
    assert _steps(bucket) == [1]
    file.close()


def test_a_call_that_begins_at_the_step_of_another_keeps_its_lines(bucket):
    _write(bucket, 100, [100, 101], call=1)
    drop_metrics_after(bucket, 100)
    _write(bucket, 100, [100, 101], call=2)
    _write(bucket, 100, [102], call=3)
    assert sorted(Bucket.objects()) == [
        f"metrics-000000100{suffix}.jsonl" for suffix in (".1", ".2", "")
    ]
    calls = [(line["step"], line["call"]) for line in read_metrics(bucket)]
    assert calls == [(100, 1), (100, 2), (101, 2), (102, 3)]


def test_a_long_call_begins_new_parts_and_writes_none_again(bucket, monkeypatch):
    monkeypatch.setattr(metrics_file, "_PART_BYTES", 100)
    file = MetricsFile(bucket, 0, HOUR)
    for step in range(1, 41):
        file.write({"step": step})
        if step % 5 == 0:
            file.flush()
    file.close()
    sizes = {name: len(text) for name, text in Bucket.objects().items()}
    assert list(sizes)[:3] == [f"metrics-{step:09d}.jsonl" for step in (0, 10, 18)]
    assert max(sizes.values()) < 120
    assert sum(size for _, size in Bucket.written) < 3 * sum(sizes.values())
    assert _steps(bucket) == list(range(1, 41))
    assert len(file._lines._parts) <= 2  # the others have left memory


def test_a_line_that_comes_during_an_upload_is_in_the_next(bucket, monkeypatch):
    file = MetricsFile(bucket, 0, HOUR)
    write = Bucket.pipe_file

    def slow(*args, **kwargs):
        if not Bucket.written:
            file.write({"step": 2})
        write(*args, **kwargs)

    monkeypatch.setattr(Bucket, "pipe_file", slow)
    file.write({"step": 1})
    file.flush()
    assert _steps(bucket) == [1]
    file.close()
    assert _steps(bucket) == [1, 2]


def test_what_is_stored_is_not_written_again(bucket):
    file = MetricsFile(bucket, 0, HOUR)
    file.write({"step": 1})
    for _ in range(3):
        assert file._lines._background.flush()  # as every `upload_seconds`
    assert len(Bucket.written) == 1
    file.close()


def test_a_store_that_fails_is_named_once_and_loses_nothing(bucket, monkeypatch, caplog):
    monkeypatch.setattr(metrics_file, "_PART_BYTES", 100)
    file = MetricsFile(bucket, 0, HOUR)
    with Bucket.failing(ConnectionError("reset")):
        for step in range(1, 31):
            file.write({"step": step})
            file.flush()
    assert [record.message for record in caplog.records] == [
        "uploading teststore://bucket/run/metrics.jsonl: "
        "teststore://bucket/run/metrics-000000000.jsonl cannot be written: ConnectionError: reset; "
        "check the bucket's name and the access to it; it is tried again"
    ]
    file.flush()
    assert _steps(bucket) == list(range(1, 31))
    assert caplog.messages[1:] == ["uploading teststore://bucket/run/metrics.jsonl: it works again"]
    file.close()


def test_what_cannot_be_uploaded_at_the_end_is_counted(bucket, monkeypatch, caplog):
    monkeypatch.setattr(uploads, "_LAST_WAITS", (0.0, 0.0))
    file = MetricsFile(bucket, 0, HOUR)
    file.write({"step": 1})
    file.write({"step": 2})
    with Bucket.failing(PermissionError("forbidden")):
        file.close()
    assert caplog.messages[1:] == ["teststore://bucket/run/metrics.jsonl: 2 lines are lost"]


def test_lines_after_a_step_are_dropped(workdir):
    drop_metrics_after(workdir, 3)
    assert read_metrics(workdir) == []
    _write(workdir, 0, [1, 3])
    _write(workdir, 3, [3, 4])
    _write(workdir, 4, [5, 6])
    Bucket.written.clear()
    drop_metrics_after(workdir.metrics, 3)
    assert _steps(workdir) == [1, 3, 3]
    # In a bucket, what is as it was is not written, and what is wholly later is gone.
    if workdir.metrics.exists():
        return
    assert [name for name, _ in Bucket.written] == ["metrics-000000003.jsonl"]
    assert sorted(Bucket.objects()) == ["metrics-000000000.jsonl", "metrics-000000003.jsonl"]


def test_a_run_that_moved_between_disk_and_bucket_is_read_by_steps(tmp_path, bucket):
    texts = {
        "metrics.jsonl": [1, 2, 5, 6],
        "metrics-000000002.jsonl": [2, 3, 4],
        "metrics-x.jsonl": [0],
        "other-000000002.jsonl": [0],
    }
    for name, steps in texts.items():
        text = "".join(json.dumps({"step": step, "in": name}) + "\n" for step in steps)
        (tmp_path / name).write_text(text)
        (bucket.path / name).write_text(text)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 5, 6]
    assert [line["in"] for line in lines][1:3] == ["metrics.jsonl", "metrics-000000002.jsonl"]
    assert read_metrics(bucket) == lines


def test_a_bad_line_in_the_middle_of_a_part_is_named_and_nothing_is_lost(bucket):
    _write(bucket, 0, [1, 2])
    (bucket.path / "metrics-000000002.jsonl").write_text('{"step": 3}\n{broken\n{"step": 4}\n')
    before = Bucket.objects()
    with pytest.raises(UserError, match=r"metrics-000000002.jsonl line 2 is not a metrics line"):
        drop_metrics_after(bucket, 1)
    assert Bucket.objects() == before


def test_a_number_that_is_not_finite_is_refused(workdir):
    file = MetricsFile(workdir, 0, HOUR)
    with pytest.raises(ValueError, match="JSON compliant"):
        file.write({"step": 1, "loss": float("nan")})
    file.close()


def test_bad_samples_of_each_process_are_kept_up_to_a_position(workdir):
    for process in (0, 1):
        path = workdir.bad_samples(process)
        drop_bad_samples_after(path, 0)
        file = BadSamplesFile(path, 0, HOUR)
        file.write([])
        file.flush()
        file.write([{"position": 7, "reason": "decode"}, {"position": 9, "reason": str(process)}])
        file.close()
        later = BadSamplesFile(path, 20, HOUR)
        later.write([{"position": 20 + process}])
        later.close()
        quiet = BadSamplesFile(path, 30, HOUR)
        quiet.close()
    drop_bad_samples_after(workdir.bad_samples(1), 9)
    drop_bad_samples_after(workdir.bad_samples(0), 21)

    def kept(process):
        files = metrics_file._read_files(workdir.bad_samples(process))
        return [json.loads(line)["position"] for _, text in files for line in text.splitlines()]

    assert kept(0) == [7, 9, 20]
    assert kept(1) == [7]
    names = sorted(path.name for path in workdir.path.iterdir())
    if workdir.bad_samples().exists():
        assert names == ["bad_samples.1.jsonl", "bad_samples.jsonl"]
    else:
        assert names == [
            *("bad_samples-000000000.jsonl", "bad_samples-000000020.jsonl"),
            "bad_samples.1-000000000.jsonl",
        ]


def test_a_process_without_bad_samples_makes_no_file(workdir):
    file = BadSamplesFile(workdir.bad_samples(), 0, HOUR)
    file.write([])
    file.close()
    assert not list(workdir.path.iterdir())
