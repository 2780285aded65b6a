import json

import pytest

from clip_jax.data.record import BadSampleError
from clip_jax.data.report import BadSample, BatchReport, ReportTotals, why_bad


def bad(number: int, reason: str = "image") -> BadSample:
    shard = f"{number // 1000}.tar"
    return BadSample(number, "s", shard, f"{shard}, key {number}", reason, "does not decode")


def test_stats_are_of_a_lap_and_always_the_same():
    totals = ReportTotals()
    nothing = totals.stats()
    assert set(nothing.values()) == {0.0}
    totals.add(BatchReport(8, read=0.1, decode=0.2, tokenize=0.3, batch=0.4, num_cut_captions=2))
    totals.add(BatchReport(8, read=0.06, bad_samples=[bad(1), bad(2), bad(1001, "read")]))
    stats = totals.stats()
    assert list(stats) == list(nothing)
    assert stats == pytest.approx(
        {
            "data/read_ms": 10,
            "data/decode_ms": 12.5,
            "data/tokenize_ms": 18.75,
            "data/batch_ms": 25,
            "data/bad_samples": 3,
            "data/bad_read": 1,
            "data/bad_archive": 0,
            "data/bad_image": 2,
            "data/bad_caption": 0,
            "data/bad_shards": 2,
            "data/cut_captions": 2,
        }
    )
    assert totals.stats() == nothing | {"data/bad_shards": 2}


def test_reports_of_threads_add_up():
    report = BatchReport(3, read=0.5, batch=1.0, bad_samples=[bad(1)])
    report.add(BatchReport(2, 0.25, 2.0, 3.0, 4.0, 5, [bad(2), bad(3)]))
    assert report == BatchReport(5, 0.75, 2.0, 3.0, 5.0, 5, [bad(1), bad(2), bad(3)])


def test_bad_samples_are_drained_once():
    totals = ReportTotals()
    totals.add(BatchReport(1, bad_samples=[bad(7)]))
    (line,) = totals.drain_bad_samples()
    assert json.loads(json.dumps(line)) == {
        "time": line["time"],
        "position": 7,
        "source": "s",
        "shard": "0.tar",
        "sample": "0.tar, key 7",
        "reason": "image",
        "message": "does not decode",
    }
    assert totals.drain_bad_samples() == []


def test_many_bad_samples_fill_neither_log_nor_memory(caplog):
    totals = ReportTotals()
    for first in range(0, 20_000, 100):
        totals.add(BatchReport(100, bad_samples=[bad(first + number) for number in range(100)]))
    assert 5 < len(caplog.records) < 30
    assert totals.stats()["data/bad_samples"] == 20_000
    kept = totals.drain_bad_samples()
    assert [kept[0]["position"], len(kept)] == [10_000, 10_000]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BadSampleError("caption", "none"), "caption"),
        (FileNotFoundError("gone"), "read"),
        (ValueError("torn"), "archive"),
    ],
)
def test_reasons(error, reason):
    assert why_bad(error, otherwise="archive") == reason
