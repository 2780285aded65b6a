"""Whole runs on a small tar: learn, stop, resume to the bit, score, report."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from data.tars import pairs, write_tar
from small import mesh_of, small_config

from clip_jax.checkpoint import (
    CheckpointStore,
    Workdir,
    leaves_by_path,
    read_metrics,
    read_quarantine,
)
from clip_jax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvalSetConfig,
    EvaluationConfig,
    ExperimentConfig,
    LoggingConfig,
    OptimizerConfig,
    ScheduleConfig,
    SourceConfig,
    StabilityConfig,
    StartConfig,
    TokenizerConfig,
    UserError,
)
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.evaluate_run import evaluate_run
from clip_jax.training.loop import train
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.start import starting_arrays
from clip_jax.training.state import abstract_state

# What a clock or the machine says.
MEASURED = (
    *("samples_per_second", "steps_per_second", "data_wait", "train_seconds", "compile_seconds"),
    *("productive_seconds", "goodput", "restarts", "unix_time", "time/", "memory/", "mfu"),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ExperimentConfig:
    folder = tmp_path_factory.mktemp("pairs")
    tar = write_tar(folder / "pairs.tar", pairs(0, 100))
    small = small_config()
    text = dataclasses.replace(small.model.text, vocab_size=300, eot_id=2)
    return dataclasses.replace(
        small,
        num_steps=10,
        optimizer=OptimizerConfig(ema_decay=0.5),
        schedule=ScheduleConfig(name="wsd", warmup_steps=2),
        model=dataclasses.replace(small.model, text=text),
        data=DataConfig(
            tokenizer=TokenizerConfig(kind="bpe"),
            sources={"pairs": SourceConfig(path=str(tar))},
            cache_dir=str(folder / "cache"),
        ),
        evaluation=EvaluationConfig(
            sets={"pairs": EvalSetConfig(path=str(tar), zero_shot_ways=10)}, batch_size=32
        ),
        checkpoint=CheckpointConfig(every_steps=5),
        logging=LoggingConfig(every_steps=1),
    )


@pytest.fixture(scope="module")
def whole_run(config, tmp_path_factory) -> Workdir:
    """Ten steps without a stop."""
    workdir = Workdir(tmp_path_factory.mktemp("runs") / "whole")
    outcome = train(config, workdir)
    assert outcome.finished
    assert outcome.step == 10
    return workdir


def saved_steps(workdir: Workdir) -> list[int]:
    with contextlib.closing(CheckpointStore(workdir.checkpoints)) as store:
        return store.steps()


def facts(workdir: Workdir) -> list[dict]:
    """The metrics without what a clock says."""
    return [
        {k: v for k, v in line.items() if not k.startswith(MEASURED) and not k.endswith("_ms")}
        for line in read_metrics(workdir.metrics)
    ]


def test_a_run_leaves_what_the_design_says(whole_run, config):
    assert {path.name for path in whole_run.path.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "sessions.jsonl",
        "tokenizer.json",
        "report.html",
        ".lock",
    }
    saved = whole_run.load_config()
    assert saved.data.packing.group_size is not None  # chosen by the run, and kept
    data = dataclasses.replace(config.data, packing=saved.data.packing)
    assert saved == dataclasses.replace(config, data=data)
    store = CheckpointStore(whole_run.checkpoints)
    assert store.steps() == [5, 10]
    metadata = store.metadata(5)
    assert metadata["samples_seen"] == 5 * config.global_batch_size
    assert metadata["config"] == json.loads(whole_run.config.read_text())
    assert json.loads(metadata["tokenizer"]) == json.loads(whole_run.tokenizer.read_text())
    store.close()


def test_metrics_have_the_promised_fields(whole_run, config):
    lines = read_metrics(whole_run.metrics)
    training, evaluation = lines[:-1], lines[-1]
    assert [line["step"] for line in lines] == [*range(1, 11), 10]
    for line in training:
        assert line["samples_seen"] == line["step"] * config.global_batch_size
        assert line.keys() >= {"loss", "learning_rate", "logit_scale", "samples_per_second"}
    for direction in ("text_to_image", "image_to_text"):
        for k in (1, 5, 10):
            name = f"eval/pairs/{direction}_R@{k}"
            assert 0 <= evaluation[name] <= 1
            assert evaluation[f"{name}/chance"] == k / 100
    assert evaluation["eval/pairs/zero_shot_10way_top1/chance"] == 0.1
    assert evaluation["eval/pairs/num_pairs"] == 100


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ten_steps_equal_some_stop_and_resume(whole_run, config, tmp_path, capsys, number):
    """A signal from outside, at whatever step it strikes: the numbers are those of no stop."""
    workdir = Workdir(tmp_path / "run")
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=1000))

    def interrupt() -> None:
        while not read_metrics(workdir.metrics):
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    outcome = train(config, workdir)
    thread.join()
    assert not outcome.finished
    assert 1 <= outcome.step < 10
    assert saved_steps(workdir) == [outcome.step]
    said = capsys.readouterr().err
    assert f"stopped at step {outcome.step}, saved. To go on: " in said
    assert f"-m clip_jax.cli train --config={workdir.config} --workdir={workdir.path}" in said
    assert train(config, workdir).finished
    assert facts(workdir) == facts(whole_run)


def test_resume_from_a_checkpoint_drops_later_lines(whole_run, config, tmp_path):
    """As after a crash: step 10 of ten is lost, with lines in metrics.jsonl past the checkpoint."""
    workdir = Workdir(tmp_path / "run")
    shutil.copytree(whole_run.path, workdir.path)
    shutil.rmtree(workdir.checkpoints / "10")
    with workdir.metrics.open("a") as file:
        file.write('{"step": 11, "lo')  # cut short by the crash
    assert train(config, workdir).finished
    assert facts(workdir) == facts(whole_run)


def test_resume_on_other_devices_and_workers_is_allowed(whole_run, config, tmp_path, capsys):
    workdir = Workdir(tmp_path / "run")
    shutil.copytree(whole_run.path, workdir.path)
    shutil.rmtree(workdir.checkpoints / "10")
    other = dataclasses.replace(
        config,
        mesh=(2, 2, 2),
        microbatches=2,
        remat="full",
        data=dataclasses.replace(config.data, num_threads=3),
    )
    assert train(other, workdir).finished
    said = capsys.readouterr().err
    assert "config change on resume: mesh (-1, 1, 1) -> (2, 2, 2)" in said
    expected = facts(whole_run)
    for line, other_line in zip(facts(workdir)[:10], expected[:10], strict=True):
        np.testing.assert_allclose(line["loss"], other_line["loss"], rtol=1e-5)


def spiky(config: ExperimentConfig, *, max_rewinds: int) -> ExperimentConfig:
    """A run that goes back wherever a loss is above the median of eight at all."""
    return dataclasses.replace(
        config,
        num_steps=16,
        stability=StabilityConfig(spike_zscore=1e-6, spike_window=8, max_rewinds=max_rewinds),
        checkpoint=CheckpointConfig(every_steps=3),
        evaluation=EvaluationConfig(),
    )


def test_a_spike_sends_a_run_back_without_its_samples(config, tmp_path, capsys):
    workdir, other = Workdir(tmp_path / "run"), spiky(config, max_rewinds=50)
    with pytest.raises(UserError, match=r"as often as config\.stability\.max_rewinds 0 allows"):
        train(spiky(config, max_rewinds=0), workdir)
    assert read_quarantine(workdir) == []
    capsys.readouterr()
    assert train(other, workdir).finished
    entries = read_quarantine(workdir)
    assert entries
    said = capsys.readouterr().err
    for entry in entries:
        assert entry["to"] - entry["from"] == 32
        assert entry["step"] > 8  # the window was full
        assert f"at step {entry['step']} is" in said
        saved = 3 * ((entry["step"] - 1) // 3)  # the spike itself is never saved
        assert f"resuming {workdir.path} at step {saved}" in said
    # The samples are left out for good: as by a run that never met them.
    ranges = tuple((entry["from"], entry["to"]) for entry in entries)
    calm = dataclasses.replace(
        other,
        stability=StabilityConfig(),
        data=dataclasses.replace(config.data, skipped_ranges=ranges),
    )
    never_met = Workdir(tmp_path / "never-met")
    train(calm, never_met)
    # A branch keeps to them, though it has no list of its own.
    start = StartConfig(branch=str(workdir.path), step=15)
    branch = Workdir(tmp_path / "branch")
    train(dataclasses.replace(other, stability=StabilityConfig(), start=start), branch)
    assert facts(branch) == facts(never_met)[-1:]
    assert facts(workdir) == facts(never_met)


def test_the_best_are_kept_by_a_score_that_must_be_one(config, tmp_path):
    evaluation = dataclasses.replace(config.evaluation, every_steps=2, report=False)
    metric = "eval/pairs/text_to_image_R@10"
    best = dataclasses.replace(
        config,
        num_steps=6,
        evaluation=evaluation,
        checkpoint=CheckpointConfig(
            every_steps=100, keep_latest=1, keep_best=1, best_metric=metric
        ),
    )
    typo = dataclasses.replace(best.checkpoint, best_metric="eval/pairs/R@10")
    workdir = Workdir(tmp_path / "run")
    with pytest.raises(UserError, match=r"'eval/pairs/R@10' is none of the scores: .*_R@10"):
        train(dataclasses.replace(best, checkpoint=typo), workdir)
    assert not workdir.exists()
    train(best, workdir)
    scores = {line["step"]: line[metric] for line in facts(workdir) if metric in line}
    assert sorted(scores) == [2, 4, 6]
    highest = max(scores, key=lambda step: (scores[step], step))
    assert set(saved_steps(workdir)) == {highest, 6}


def test_skipped_updates_in_a_row_end_a_run_with_one_line(config, tmp_path):
    broken = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e30),
        stability=StabilityConfig(max_skipped_steps=3),
        evaluation=EvaluationConfig(),
    )
    workdir = Workdir(tmp_path / "run")
    with pytest.raises(UserError, match=r"the last 3 updates up to step \d+ .* were left out"):
        train(broken, workdir)
    assert read_metrics(workdir.metrics)[-1]["skipped_steps"] == 3


def test_a_cooldown_branches_off_any_checkpoint(whole_run, config, tmp_path):
    """Of 'wsd': until the cooldown the rate knows nothing of the run's length."""
    cooldown = dataclasses.replace(
        config,
        num_steps=8,
        schedule=dataclasses.replace(config.schedule, cooldown_steps=3),
        evaluation=EvaluationConfig(),
    )
    branch, whole = Workdir(tmp_path / "branch"), Workdir(tmp_path / "whole")
    train(
        dataclasses.replace(cooldown, start=StartConfig(branch=str(whole_run.path), step=5)), branch
    )
    train(cooldown, whole)
    ours, theirs = facts(branch), [line for line in facts(whole) if line["step"] > 5]
    assert [line["step"] for line in ours] == [6, 7, 8]
    for line, expected in zip(ours, theirs, strict=True):
        # The programs of both trunks differ, and with them the last bits.
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert ours[-1]["learning_rate"] < ours[0]["learning_rate"] == pytest.approx(5e-4)
    late = dataclasses.replace(cooldown, start=StartConfig(branch=str(whole_run.path), step=10))
    with pytest.raises(UserError, match="is at step 10 already"):
        train(late, Workdir(tmp_path / "late"))


def test_the_moving_average_is_scored_and_started_from(whole_run, config):
    ema = dataclasses.replace(config.evaluation, use_ema=True)
    scores, _ = evaluate_run(config, whole_run, step=5)
    averaged, report = evaluate_run(dataclasses.replace(config, evaluation=ema), whole_run, step=5)
    report.unlink()
    assert averaged != scores
    start = dataclasses.replace(config, start=StartConfig(model=str(whole_run.path), step=5))
    mesh = mesh_of(8)
    task = ContrastiveTask(config, mesh)
    abstract = abstract_state(task, make_optimizer(config), mesh, ema=True)
    with contextlib.closing(CheckpointStore(whole_run.checkpoints)) as store:
        saved = store.load(("params", "ema"), 5)
    for group, use_ema in (("params", False), ("ema", True)):
        asked = dataclasses.replace(start.start, use_ema=use_ema)
        arrays = starting_arrays(dataclasses.replace(config, start=asked), abstract)
        for path, array in leaves_by_path(saved[group]).items():
            np.testing.assert_array_equal(arrays[path], array)


def test_a_finished_run_says_so_and_scores_again_from_disk(whole_run, config, capsys):
    before = whole_run.metrics.read_text()
    outcome = train(config, whole_run)
    assert outcome.finished
    assert "is done: 10 steps" in capsys.readouterr().err
    assert whole_run.metrics.read_text() == before
    assert evaluate_run(config, whole_run) == (outcome.scores, whole_run.report)
    scores, report = evaluate_run(config, whole_run, step=5)
    assert scores != outcome.scores
    assert report == whole_run.path / "report-step-5.html"
    report.unlink()


def test_another_config_is_refused_and_nothing_is_lost(whole_run, config):
    before = {p: p.read_bytes() for p in whole_run.path.iterdir() if p.is_file()}
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(UserError, match="seed 0 -> 1; use another --workdir, or --allow_config"):
        train(other, whole_run)
    assert {p: p.read_bytes() for p in whole_run.path.iterdir() if p.is_file()} == before


def test_a_tokenizer_that_does_not_fit_is_refused(config, tmp_path):
    text = dataclasses.replace(config.model.text, eot_id=5)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
    with pytest.raises(ConfigError, match="end of text is token 2"):
        train(other, Workdir(tmp_path / "run"))


def test_data_that_goes_bad_on_the_way_loses_no_step(config, tmp_path):
    """Every picture from the second epoch on is gone: the run ends with one line, saved."""
    tar = write_tar(tmp_path / "pairs.tar", pairs(0, 40))
    source = SourceConfig(path=str(tar))
    data = dataclasses.replace(config.data, sources={"pairs": source}, on_bad_sample="fail")
    # More steps than could be read ahead before the file is cut.
    other = dataclasses.replace(config, data=data, num_steps=400)
    workdir = Workdir(tmp_path / "run")

    def cut() -> None:
        while len(read_metrics(workdir.metrics)) < 3:
            time.sleep(0.005)
        os.truncate(tar, 512)

    thread = threading.Thread(target=cut)
    thread.start()
    with pytest.raises(UserError, match=r"bad sample in data source 'pairs': .*pairs\.tar"):
        train(other, workdir)
    thread.join()
    last = read_metrics(workdir.metrics)[-1]["step"]
    assert 3 <= last < 400
    assert saved_steps(workdir)[-1] >= last


def test_missing_evaluation_set_stops_before_training(config, tmp_path):
    sets = {"gone": EvalSetConfig(path=str(tmp_path / "gone.tar"))}
    other = dataclasses.replace(
        config, evaluation=dataclasses.replace(config.evaluation, sets=sets)
    )
    workdir = Workdir(tmp_path / "run")
    with pytest.raises(UserError, match=r"gone\.tar"):
        train(other, workdir)
    assert not workdir.config.exists()


def test_an_evaluation_set_without_captions_stops_before_training(config, tmp_path):
    members = dict(pairs(0, 3)) | {"s0001.txt": b" "}
    tar = write_tar(tmp_path / "bad.tar", members.items())
    sets = {"bad": EvalSetConfig(path=str(tar))}
    bad = dataclasses.replace(config, evaluation=EvaluationConfig(sets=sets, batch_size=32))
    with pytest.raises(UserError, match=r"in evaluation set 'bad': .*key s0001: no caption"):
        train(bad, Workdir(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_image_that_spoils_the_last_evaluation_loses_nothing(config, whole_run, tmp_path):
    members = dict(pairs(0, 3)) | {"s0001.png": b"no picture"}
    tar = write_tar(tmp_path / "bad.tar", members.items())
    workdir = Workdir(shutil.copytree(whole_run.path, tmp_path / "run"))
    workdir.report.unlink()
    sets = {"bad": EvalSetConfig(path=str(tar))}
    bad = dataclasses.replace(config, evaluation=EvaluationConfig(sets=sets, batch_size=32))
    with pytest.raises(UserError, match=r"key s0001: cannot decode .*clip-jax eval --workdir="):
        train(bad, workdir)
    assert saved_steps(workdir) == [5, 10]


def test_evaluation_during_the_run(config, tmp_path):
    other = dataclasses.replace(
        config,
        num_steps=4,
        evaluation=dataclasses.replace(config.evaluation, every_steps=2, report=False),
    )
    workdir = Workdir(tmp_path / "run")
    train(other, workdir)
    evaluated = [x["step"] for x in read_metrics(workdir.metrics) if "eval/pairs/num_pairs" in x]
    assert evaluated == [2, 4]
    assert not workdir.report.exists()


def test_the_ragged_tail_is_exact(whole_run, config):
    """100 pairs in batches of 32 and of 100, on other devices: the same scores."""
    scores, _ = evaluate_run(config, whole_run)
    other = dataclasses.replace(
        config, mesh=(4, 1, 2), evaluation=dataclasses.replace(config.evaluation, batch_size=100)
    )
    assert evaluate_run(other, whole_run)[0] == pytest.approx(scores, abs=0.011)  # a near tie


def test_a_missing_report_and_a_new_set_are_made_up_for(whole_run, config, tmp_path):
    workdir = Workdir(tmp_path / "run")
    shutil.copytree(whole_run.path, workdir.path)
    workdir.report.unlink()
    train(config, workdir)
    assert workdir.report.exists()
    sets = config.evaluation.sets | {"again": config.evaluation.sets["pairs"]}
    more = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, sets=sets))
    scores = train(more, workdir).scores
    assert scores["eval/again/num_pairs"] == 100
    assert train(more, workdir).scores == scores


def test_the_report_shows_the_scores(whole_run):
    page = whole_run.report.read_text()
    scores = read_metrics(whole_run.metrics)[-1]
    assert f"{scores['eval/pairs/text_to_image_R@10']:.1%}" in page
    assert "for 10 steps of 32" in page


def test_a_start_that_fails_early_does_not_spoil_the_workdir(config, tmp_path):
    """More pairs in a batch than there are: refused, and the next start with less goes through."""
    workdir = Workdir(tmp_path / "run")
    with pytest.raises(UserError, match="100 samples"):
        train(dataclasses.replace(config, global_batch_size=128), workdir)
    assert not workdir.checkpoints.exists()
    assert train(dataclasses.replace(config, num_steps=2), workdir).finished


def test_two_runs_in_one_workdir_are_refused(config, tmp_path):
    workdir = Workdir(tmp_path)
    with workdir.lock(), pytest.raises(UserError, match="another process trains in"):
        train(config, workdir)
