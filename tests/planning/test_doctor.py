"""Each planted fault is found, with its remedy; a sound run has none; the work is bounded."""

import argparse
import contextlib
import dataclasses
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from checkpoint.buckets import Bucket
from data.tars import pairs, png, write_tar
from planning.doctor_faults import (
    VERSIONS,
    WARNINGS,
    faults,
    machine,
    source,
    streams,
    tiny_model,
)
from small import mesh_of, small_config

from clip_jax.checkpoint import CheckpointStore, Workdir
from clip_jax.cli_planning import add_planning_commands
from clip_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalSetConfig,
    EvaluationConfig,
    ExperimentConfig,
    SourceConfig,
    StartConfig,
    TokenizerConfig,
    UserError,
    to_json,
)
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.planning import doctor_machine
from clip_jax.planning.doctor import Diagnosis, Part, diagnose, parts_of, run_parts
from clip_jax.planning.doctor_case import Case, Finding
from clip_jax.planning.doctor_machine import Devices, look
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.state import abstract_state, init_state

CHECKS = (
    *("versions", "devices", "precision", "mesh", "cache", "tokenizer", "sources", "samples"),
    *("captions", "evaluation", "state", "workdir", "lock", "checkpoints", "start", "room"),
    "memory",
)


class Sound(NamedTuple):
    """A run in whose workdir two checkpoints are."""

    config: ExperimentConfig
    folder: Path


def make_run(workdir: Workdir, config: ExperimentConfig, steps: tuple[int, ...]) -> None:
    workdir.path.mkdir(parents=True)
    workdir.save_config(config)
    task, mesh = ContrastiveTask(config, mesh_of(1)), mesh_of(1)
    optimizer = make_optimizer(config, task.trainable)
    abstract = abstract_state(task, optimizer, mesh)
    state = init_state(task, optimizer, abstract, 0)
    keep_all = CheckpointConfig(keep_latest=len(steps))
    with contextlib.closing(CheckpointStore(workdir.checkpoints, keep_all)) as store:
        for step in steps:
            store.save(step, state, {"samples_seen": 0})
        store.wait()


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Sound:
    folder = tmp_path_factory.mktemp("doctor")
    for number in range(4):
        write_tar(folder / f"{number}.tar", pairs(20 * number, 20))
    write_tar(folder / "images.tar", [(f"{i}.{end}", png(i)) for i in range(3) for end in ("png",)])
    broken = [(name, data[:40] if name.endswith("png") else data) for name, data in pairs(0, 20)]
    write_tar(folder / "broken.tar", broken)
    Tokenizer.train(["caption 1", "caption 23"], 300, lowercase=True).save(
        folder / "tokenizer.json"
    )
    config = small_config(
        model=tiny_model(),
        data=DataConfig(
            sources={"pairs": SourceConfig(path=f"{folder}/{{0..3}}.tar")},
            tokenizer=TokenizerConfig(kind="file", path=f"{folder}/tokenizer.json"),
            cache_dir=f"{folder}/cache",
        ),
        evaluation=EvaluationConfig(
            sets={"unseen": EvalSetConfig(path=f"{folder}/0.tar")}, batch_size=32
        ),
    )
    make_run(Workdir(folder / "run"), config, (3, 6))
    return Sound(config, folder)


@pytest.fixture
def workdir(sound, tmp_path) -> Workdir:
    """A copy of the run, to be harmed."""
    shutil.copytree(sound.folder / "run", tmp_path / "run")
    return Workdir(tmp_path / "run")


def lines(diagnosis: Diagnosis, level: str) -> list[Finding]:
    return [finding for finding in diagnosis.findings if finding.level == level]


def case(sound: Sound, **changes: Any) -> Case:
    return Case(**{"config": sound.config, "machine": machine()} | changes)


def examine(case: Case, check: str) -> Diagnosis:
    """By the checks that run one after another with this one."""
    return run_parts([part for part in parts_of(case) if check in part.names], seconds=60)


def test_a_sound_run_has_no_fault_and_each_check_says_what_it_saw(sound):
    diagnosis = diagnose(case(sound, workdir=Workdir(sound.folder / "run")), seconds=60)
    assert [finding for finding in diagnosis.findings if finding.level != "ok"] == []
    assert [finding.check for finding in diagnosis.findings] == list(CHECKS)
    texts = {finding.check: finding.text for finding in diagnosis.findings}
    assert "64 read and decoded of 80 in 4 files" in texts["sources"]
    assert "step 6, the newest whole one of 2, fits" in texts["checkpoints"]
    assert texts["samples"].startswith("80 samples; the run sees 320, 4 times")
    assert "8 devices as data 8" in texts["mesh"]
    assert set(diagnosis.seconds) == set(CHECKS)


FAULTS = tuple(faults(small_config(), Path("/none")))


def test_there_are_15_and_more():
    assert len(FAULTS) >= 15


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_with_its_remedy(sound, name):
    check, changes, said = faults(sound.config, sound.folder)[name]
    with Bucket.failing(ConnectionRefusedError("nobody is there")):
        diagnosis = examine(case(sound, **changes), check)
    errors = lines(diagnosis, "error")
    assert any(e.check == check and re.search(said, e.text) for e in errors), errors


@pytest.mark.parametrize("name", WARNINGS)
def test_what_may_be_meant_is_a_warning(sound, name):
    check, change, said = WARNINGS[name]
    diagnosis = examine(case(sound, config=change(sound.config)), check)
    assert lines(diagnosis, "error") == []
    (warning,) = lines(diagnosis, "warning")
    assert warning.check == check
    assert re.search(said, warning.text), warning.text


def test_the_newest_checkpoint_is_damaged(sound, workdir):
    for step, level, said in (
        (6, "warning", r"damaged: step 6 \(.*missing\); the run goes on from step 3"),
        (3, "error", r"damaged: step 6 .*, 3 .*none is whole, so a run stops: bring back a copy"),
    ):
        (workdir.checkpoints / str(step) / "state" / "manifest.ocdbt").unlink()
        diagnosis = examine(case(sound, workdir=workdir), "checkpoints")
        (finding,) = (f for f in diagnosis.findings if f.level != "ok")
        assert (finding.level, finding.check) == (level, "checkpoints")
        assert re.search(said, finding.text)
    assert sorted(path.name for path in workdir.checkpoints.iterdir()) == ["3", "6"]  # not moved


def test_all_faults_are_told_at_once(sound):
    """A check that fails keeps none from running."""
    broken = dataclasses.replace(
        source(sound.config, path="gone.tar"), seed=1, mesh=(3, 1, 1), precision="bfloat16"
    )
    old = machine(versions=VERSIONS | {"flax": "0.12.1"}, memory_bytes=1000)
    run = Workdir(sound.folder / "run")
    found = diagnose(case(sound, config=broken, machine=old, workdir=run), seconds=60)
    errors = [finding.check for finding in lines(found, "error")]
    assert errors == ["versions", "mesh", "sources", "workdir", "memory"]
    warnings = [finding.check for finding in lines(found, "warning")]
    assert warnings == ["precision", "samples", "captions"]
    assert set(found.seconds) == set(CHECKS)


def test_weights_of_another_resolution_and_context_fit(sound):
    """Their position embeddings are resampled."""
    model = tiny_model(context_length=12)
    model = dataclasses.replace(model, image=dataclasses.replace(model.image, image_size=32))
    start = StartConfig(model=f"{sound.folder}/run")
    config = dataclasses.replace(sound.config, model=model, start=start)
    found = {f.check: f for f in examine(case(sound, config=config), "start").findings}
    assert found["start"] == Finding("ok", "start", f"model {sound.folder}/run fits")


def test_another_run_holds_the_lock(sound, workdir):
    with workdir.lock():
        (error,) = lines(examine(case(sound, workdir=workdir), "lock"), "error")
    assert error.check == "lock"
    assert "another process trains in" in error.text


def test_nothing_is_made_where_there_is_no_workdir(sound, tmp_path):
    diagnosis = examine(case(sound, workdir=Workdir(tmp_path / "a" / "b")), "workdir")
    assert lines(diagnosis, "error") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["bucket", "file", "in a file"])
def test_a_workdir_that_cannot_be_used_is_told_once(sound, tmp_path, place):
    """Nor is what depends on it called sound."""
    (tmp_path / "file").write_text("")
    folder = {
        "bucket": "gs://bucket/run",
        "file": str(tmp_path / "file"),
        "in a file": str(tmp_path / "file" / "run"),
    }[place]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gcsfs", None)
        found = diagnose(case(sound, workdir=Workdir(folder)), seconds=60)
    assert [finding.check for finding in found.findings if finding.level != "ok"] == ["workdir"]
    assert not {"lock", "checkpoints", "room"} & {finding.check for finding in found.findings}
    said = "pip install 'clip-jax-training[gcs]'" if place == "bucket" else "is a file; name a"
    assert said in lines(found, "error")[0].text


def test_of_other_machines_a_plan_tells_whether_a_step_fits(sound):
    def state(**changes):
        found = examine(case(sound, **changes), "state").findings
        return next(finding.text for finding in found if finding.check == "state")

    assert "each of 16 devices, of an unknown kind; `clip-jax plan" in state(num_devices=16)
    assert "clip-jax plan" not in state()


def test_numbers_of_devices_that_nobody_has_are_refused(sound, tmp_path):
    (tmp_path / "config.json").write_text(to_json(sound.config))
    with pytest.raises(UserError, match="--num_devices are at most 131,072"):
        run(f"--config={tmp_path / 'config.json'}", "--num_devices=99999999")


@pytest.fixture
def counting(monkeypatch) -> Iterator[Callable[[], int]]:
    """Requests to a bucket in memory."""
    count = 0
    plain = Bucket._check

    def check(self: Bucket) -> None:
        nonlocal count
        count += 1
        plain(self)

    monkeypatch.setattr(Bucket, "_check", check)
    yield lambda: count
    Bucket.empty()


def test_the_work_does_not_grow_with_the_data(sound, counting):
    """A hundred times the tars: the same requests, no array read or made."""
    tar = (sound.folder / "0.tar").read_bytes()
    requests = []
    for number in (40, 4000):
        for i in range(number):
            Bucket.store[f"/bucket/{i:04d}.tar"] = memory_file(f"/bucket/{i:04d}.tar", tar)
        before, arrays = counting(), len(jax.live_arrays())
        config = streams(sound.config, 4)
        config = source(config, path=f"teststore://bucket/{{0000..{number - 1:04d}}}.tar")
        diagnosis = examine(case(sound, config=config), "sources")
        assert lines(diagnosis, "error") == []
        said = next(f.text for f in diagnosis.findings if f.check == "sources")
        assert said == f"'pairs': 60 read and decoded of about {20 * number:,} in {number:,} files"
        requests.append(counting() - before)
        assert len(jax.live_arrays()) <= arrays + 1  # a key
    assert requests[0] == requests[1] < 60


def memory_file(name: str, content: bytes) -> Any:
    from fsspec.implementations.memory import MemoryFile

    return MemoryFile(Bucket(), name, content)


@pytest.mark.parametrize(
    ("problem", "level"),
    [(TimeoutError("no answer in 7 s"), "warning"), (UserError("no driver"), "error")],
    ids=("silent", "broken"),
)
def test_what_needs_devices_that_are_not_known_says_so(sound, problem, level):
    def ask() -> Devices:
        raise problem

    found = examine(case(sound, machine=machine(devices=ask)), "devices")
    levels = [(finding.check, finding.level) for finding in found.findings[1:]]
    assert levels == [("devices", level), ("precision", "warning"), ("mesh", "warning")]
    assert "give --num_devices" in found.findings[-1].text


def test_what_is_not_done_in_time_says_so_and_the_rest_is_told():
    answers = threading.Event()

    def hang() -> Iterator[Finding]:
        yield Finding("ok", "disk", "listed")
        answers.wait(60)

    def see() -> Iterator[Finding]:
        yield Finding("ok", "light", "on")

    def fail() -> Iterator[Finding]:
        raise KeyError("a fault of doctor's own")

    parts = (
        Part(("disk", "after"), lambda: {"disk": hang, "after": see}),
        Part(("own", "light"), lambda: {"own": fail, "light": see}),
    )
    diagnosis = run_parts(parts, seconds=0.5)
    answers.set()
    assert diagnosis.unfinished == ("disk", "after")
    told = [(finding.check, finding.level) for finding in diagnosis.findings]
    late = [("disk", "warning"), ("after", "warning")]
    assert [one for one in told if one[1] != "ok"] == [*late, ("own", "error")]
    assert told[-1] == ("light", "ok")
    assert "cannot be checked: KeyError" in lines(diagnosis, "error")[0].text


def test_accelerators_are_seen_without_their_driver(tmp_path):
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    for name, device in (("tpu", "0x0063"), ("network", "0x0042")):  # both Google's
        folder = tmp_path / "sys/bus/pci/devices" / name
        folder.mkdir(parents=True)
        (folder / "vendor").write_text("0x1ae0\n")
        (folder / "device").write_text(f"{device}\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:       4 kB\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("3000\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("1000\n")
    seen = look(seconds=60, root=tmp_path)
    assert (seen.num_gpus, seen.num_tpus, seen.memory_bytes) == (1, 1, 2000)
    assert seen.versions["jax"] == jax.__version__
    assert any(line.startswith("jax") for line in seen.requirements)
    assert seen.devices().platform == "cpu"  # of another process


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_planning_commands(parser.add_subparsers())
    parsed, overrides = parser.parse_known_args(["doctor", *map(str, arguments)])
    assert parsed.takes_config
    code: int = parsed.run(parsed, overrides)
    return code


def test_the_command_prints_a_line_for_each_check_and_writes_them(
    sound, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(doctor_machine, "DeviceQuery", lambda seconds: machine().devices)
    monkeypatch.setattr("clip_jax.planning.doctor.SECONDS", 60.0)
    (tmp_path / "config.json").write_text(to_json(sound.config))
    config, figures = f"--config={tmp_path / 'config.json'}", tmp_path / "found.json"
    assert run(config, "--json", figures) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in out[:-1]] == ["config", *CHECKS_WITHOUT_WORKDIR]
    assert out[-1] == f"0 errors, 0 warnings in {len(CHECKS)} checks"
    written = json.loads(figures.read_text())
    assert (written["errors"], written["warnings"]) == (0, 0)
    assert [finding["check"] for finding in written["findings"]][1:] == CHECKS_WITHOUT_WORKDIR
    assert set(written["seconds"]) == set(CHECKS)

    assert run(config, "--config.precision=bfloat16") == 0  # a warning
    assert "\nwarning precision" in capsys.readouterr().out
    assert run(config, "--num_devices=12") == 2
    assert "\nerror   mesh" in capsys.readouterr().out
    # A config that is none: what does not need it is checked all the same.
    assert run(config, "--config.optimizer.learning_rate=-1") == 2
    out = capsys.readouterr().out
    assert out.startswith("error   config       config.optimizer.learning_rate must be positive")
    assert "\nok      devices      8 cpu devices" in out


def test_findings_that_cannot_be_written_are_told_before_anything_is_checked(sound, tmp_path):
    (tmp_path / "config.json").write_text(to_json(sound.config))
    with pytest.raises(UserError, match=r"--json /proc/found\.json cannot be written: "):
        run(f"--config={tmp_path / 'config.json'}", "--json=/proc/found.json")


CHECKS_WITHOUT_WORKDIR = [name for name in CHECKS if name not in ("lock", "checkpoints")]
