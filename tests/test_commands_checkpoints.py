import argparse
import contextlib
import re
import subprocess
import sys

import pytest
from checkpoint.states import state_on
from small import mesh_of, small_config

from clip_jax.checkpoint import CheckpointStore, Workdir
from clip_jax.cli_checkpoints import add_checkpoint_commands
from clip_jax.config import CheckpointConfig, UserError

CONFIG = CheckpointConfig(keep_latest=2, keep_every_steps=10, keep_best=1)


@pytest.fixture
def workdir(tmp_path) -> Workdir:
    workdir = Workdir(tmp_path)
    workdir.save_config(small_config(checkpoint=CONFIG))
    with contextlib.closing(CheckpointStore(workdir.checkpoints, CONFIG)) as store:
        for step in (5, 10, 15, 20, 25):
            store.save(step, state_on(mesh_of(1), step), {})
            store.note_score(step, {5: 0.75}.get(step, 0.5))
        store.wait()
    return workdir


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_checkpoint_commands(parser.add_subparsers())
    parsed = parser.parse_args(["checkpoints", *map(str, arguments)])
    code: int = parsed.run(parsed, [])
    return code


def harm(workdir: Workdir, step: int) -> None:
    (workdir.checkpoints / str(step) / "state" / "manifest.ocdbt").unlink()


def test_ls_says_what_is_there_and_why(workdir, capsys):
    harm(workdir, 20)
    (workdir.checkpoints / "15.damaged").mkdir()
    assert run("ls", "--workdir", workdir.path) == 0
    lines = [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["step", "saved", "size", "score", "kept", "state"]
    rows = {line[0]: line[1:] for line in lines[1:]}
    assert list(rows) == ["5", "10", "20", "25", "15.damaged"]
    assert rows["5"][2:] == ["0.75", "best", "whole"]
    assert rows["10"][2:] == ["0.5", "latest, every 10", "whole"]  # 20 does not count
    assert rows["20"] == ["-", "-", "0.5", "-", "damaged: state/manifest.ocdbt is missing"]
    assert rows["25"][2:] == ["0.5", "latest", "whole"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", rows["25"][0])
    assert re.fullmatch(r"[\d.]+ kB", rows["25"][1])
    assert rows["15.damaged"][-1] == "moved aside"


def test_verify_names_what_is_damaged_and_exits_with_2(workdir, capsys):
    assert run("verify", "--workdir", workdir.path) == 0
    assert capsys.readouterr().out == "5: whole\n10: whole\n20: whole\n25: whole\n"
    harm(workdir, 20)
    assert run("verify", "--workdir", workdir.path, "--step", 25) == 0
    capsys.readouterr()
    assert run("verify", "--workdir", workdir.path, "--step", 25, 20) == 2
    out = capsys.readouterr().out
    assert "20: damaged, " in out
    assert "\n  state/manifest.ocdbt is missing\n" in out
    assert "\n  array params/scale cannot be read: " in out
    assert out.endswith("25: whole\n")
    with pytest.raises(UserError, match=r"no checkpoint of step 7 .* there are \[5, 10, 20, 25\]"):
        run("verify", "--workdir", workdir.path, "--step", 7)


def test_rm_removes_all_but_the_newest_whole_one(workdir, capsys):
    store = CheckpointStore(workdir.checkpoints)
    for which in (["--step", 25], ["--step", 5, 25]):
        with pytest.raises(UserError, match="step 25 is the newest checkpoint that is whole"):
            run("rm", "--workdir", workdir.path, *which)
    assert store.steps() == [5, 10, 20, 25]
    assert run("rm", "--workdir", workdir.path, "--step", 10) == 0
    harm(workdir, 25)
    with pytest.raises(UserError, match="step 20 is the newest"):
        run("rm", "--workdir", workdir.path, "--step", 20)
    assert run("rm", "--workdir", workdir.path, "--all_but_latest") == 0
    assert store.steps() == [20]
    assert run("rm", "--workdir", workdir.path, "--step", 20, "--force") == 0
    assert store.steps() == []
    assert capsys.readouterr().out == "removed 10\nremoved 5, 25\nremoved 20\n"
    with pytest.raises(UserError, match="is whole; nothing is removed"):
        run("rm", "--workdir", workdir.path, "--all_but_latest")
    store.close()


def test_rm_removes_what_was_moved_aside(workdir, capsys):
    (workdir.checkpoints / "15.damaged").mkdir()
    assert run("rm", "--workdir", workdir.path, "--damaged") == 0
    assert capsys.readouterr().out == "removed 15.damaged\n"
    assert not (workdir.checkpoints / "15.damaged").exists()


def test_a_folder_that_is_no_run_s_is_named(tmp_path):
    for command in (["ls"], ["verify"], ["rm", "--damaged"]):
        with pytest.raises(UserError, match=r"has no config\.json"):
            run(*command, "--workdir", tmp_path)


def test_no_device_starts(workdir):
    """They may be busy with the run: a second process that asks for a TPU would fail."""
    code = (
        "import argparse, sys\n"
        "from clip_jax.cli_checkpoints import add_checkpoint_commands\n"
        "parser = argparse.ArgumentParser()\n"
        "add_checkpoint_commands(parser.add_subparsers())\n"
        "assert 'jax' not in sys.modules, 'imported before it is needed'\n"
        "for command in ('ls', 'verify'):\n"
        "    parsed = parser.parse_args(['checkpoints', command, '--workdir', sys.argv[1]])\n"
        "    assert parsed.run(parsed, []) == 0\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    command = [sys.executable, "-c", code, str(workdir.path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
