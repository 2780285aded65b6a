import os

import pytest
from checkpoint.buckets import Bucket

from clip_jax.checkpoint import Workdir, add_quarantine, read_quarantine
from clip_jax.config import UserError

FIRST = {"from": 64, "to": 128, "step": 9, "loss": 11.5, "zscore": 8.25}
SECOND = {"from": 512, "to": 576, "step": 40, "loss": float("nan"), "zscore": float("inf")}


def test_entries_are_added_one_by_one(workdir):
    assert read_quarantine(workdir) == []
    add_quarantine(workdir, FIRST)
    assert read_quarantine(workdir) == [FIRST]
    add_quarantine(workdir, SECOND)
    assert read_quarantine(workdir) == [FIRST, SECOND | {"loss": None, "zscore": None}]
    assert [path.name for path in workdir.path.iterdir()] == ["quarantine.jsonl"]


def test_a_crash_leaves_the_list_as_it_was(tmp_path, monkeypatch):
    workdir = Workdir(tmp_path)
    add_quarantine(workdir, FIRST)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        add_quarantine(workdir, SECOND)
    assert read_quarantine(workdir) == [FIRST]
    assert [path.name for path in tmp_path.iterdir()] == ["quarantine.jsonl"]


def test_a_store_that_does_not_answer_is_no_empty_list(bucket):
    add_quarantine(bucket, FIRST)
    with (
        Bucket.failing(TimeoutError("no answer")),
        pytest.raises(UserError, match=r"quarantine.jsonl cannot be read: TimeoutError: no answer"),
    ):
        add_quarantine(bucket, SECOND)
    assert read_quarantine(bucket) == [FIRST]


@pytest.mark.parametrize(
    "bad", ["{broken", "", "[]", '{"from": 1}', '{"from": 8, "to": 8}', '{"from": -1, "to": 8}']
)
def test_a_broken_list_is_named_and_left_alone(workdir, bad):
    text = f'{{"from": 0, "to": 8}}\n{bad}\n'
    workdir.quarantine.write_text(text)
    for ask in (read_quarantine, lambda workdir: add_quarantine(workdir, FIRST)):
        with pytest.raises(UserError, match=r"quarantine.jsonl line 2 is no range of samples"):
            ask(workdir)
    assert workdir.quarantine.read_text() == text


def test_an_entry_that_is_no_range_is_not_written(workdir):
    with pytest.raises(UserError, match="the new entry is no range of samples"):
        add_quarantine(workdir, {"from": 128, "to": 64})
    assert read_quarantine(workdir) == []
