"""`clip-jax plan` as a user meets it, on simulated devices; its errors come before any compiler."""

import json
import os
import sys

import pytest
from checkpoint.buckets import Bucket
from data.tars import pairs, write_tar
from planning.test_report import fitting as made_by_hand

from clip_jax.cli import main

RECIPE = """
from clip_jax.config import *

def get_config():
    return ExperimentConfig(
        name="small", num_samples_seen=1600, global_batch_size=16, precision="float32",
        mesh=(2, 2, 1),
        model=ModelConfig(
            image=ImageTowerConfig(image_size=16, patch_size=8, width=32, depth=1, num_heads=2),
            text=TextTowerConfig(
                vocab_size=300, eot_id=2, context_length=8, width=32, depth=1, num_heads=2),
            embed_dim=16),
        data=DataConfig(sources={"pairs": SourceConfig(path="pairs.tar")}, cache_dir="CACHE",
            tokenizer=TokenizerConfig(kind="bpe"), packing=PackingConfig(group_size=0)),
        schedule=ScheduleConfig(warmup_steps=1),
        evaluation=EvaluationConfig(batch_size=16),
    )
"""


@pytest.fixture(autouse=True)
def environment():
    """A plan sets variables before JAX starts, which is a matter of its own process."""
    kept = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    write_tar(folder / "pairs.tar", pairs(0, 4))
    path = folder / "recipe.py"
    path.write_text(RECIPE.replace("CACHE", str(folder / "cache")))
    return path


def plan(recipe, *arguments, topology="cpu:4"):
    return main(["plan", f"--config={recipe}", f"--topology={topology}", *map(str, arguments)])


def test_a_plan_for_four_cpu_devices(recipe, capsys):
    folder = recipe.parent
    files = (f"--json={folder / 'plan.json'}", f"--html={folder / 'plan.html'}")
    assert plan(recipe, *files, "--price_per_chip_hour=3") == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("compiling small for cpu:4: mesh 2x2x1, microbatches 1, remat none")
    lines = shown.out.splitlines()
    assert lines[0].startswith("small on cpu:4: compiles: ")
    assert "  mesh                        data 2, fsdp 2, tensor 1" in lines
    assert "  steps                       100: 1,600 samples" in lines
    assert any(line.startswith("  all-reduce") for line in lines)
    assert f"page: {folder / 'plan.html'}" in lines
    content = json.loads((folder / "plan.json").read_text())
    assert content["fits"]
    # The compiler's own figures agree with those that a search goes by.
    memory, state = content["memory"], content["state_bytes"]
    assert memory["parameters"] == state["parameters"] > 0
    assert memory["optimizer"] + memory["model_state"] == state["rest"] > 0
    estimate = content["shown"]["estimate"]
    of_pixels = 2 * 4 * 192 * 32  # their gradient, which nobody needs: a ninth of so small a model
    needed = (content["shown"]["least_flops_per_sample"] - of_pixels) * 16
    assert estimate["flops"] * 4 == pytest.approx(needed, rel=0.03)
    assert estimate["cost"][1] == pytest.approx(3 * estimate["chip_hours"][1])
    assert "<title>small on cpu:4</title>" in (folder / "plan.html").read_text()
    # Compiled once: the second comes from the cache.
    assert not content["shown"]["cached"]
    assert plan(recipe, files[0]) == 0
    assert json.loads((folder / "plan.json").read_text())["shown"]["cached"]


@pytest.mark.parametrize(
    ("arguments", "topology", "message"),
    [
        ((), "v9:4x4", "there is no topology 'v9:4x4'"),
        (("--config.mesh=(3, 1, 1)",), "cpu:4", "config.mesh (3, 1, 1) needs 3 devices"),
        (("--config.mesh=(1, 1, 4)",), "cpu:4", "num_heads 2 is not divisible by the tensor axis"),
        (("--config.global_batch_size=18",), "cpu:4", "18 is not divisible by 4 data-parallel"),
        (("--json=missing/plan.json",), "cpu:4", "missing/plan.json cannot be made"),
        (("--html=missing/plan.html",), "cpu:4", "missing/plan.html cannot be made"),
        (("--json=/proc/plan.json",), "cpu:4", "--json /proc/plan.json cannot be written: "),
        (("--html=/proc/plan.html",), "cpu:4", "--html /proc/plan.html cannot be written: "),
        (("--json=both", "--html=./both"), "cpu:4", "--json and --html both name "),
        (("--sweep=mesh,layers",), "cpu:4", "'layers' is none of mesh,microbatches,remat"),
        (("--price_per_chip_hour=0",), "cpu:4", "--price_per_chip_hour is more than 0, got 0"),
        (("--max_compiles=0",), "cpu:4", "--max_compiles is 1 or more, got 0"),
        (("--measured=missing",), "cpu:4", "--measured missing is no workdir"),
        (("--calibrate",), "v5e:4x4", "--calibrate measures the CPUs of this machine"),
    ],
)
def test_bad_arguments_are_one_line_and_nothing_is_compiled(
    recipe, capsys, arguments, topology, message
):
    assert plan(recipe, *arguments, topology=topology) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("clip-jax: ")
    assert message in shown.err


def test_a_file_that_cannot_be_written_in_the_end_costs_no_other(
    recipe, tmp_path, capsys, monkeypatch
):
    from clip_jax.planning import plan as planning

    def make_plan(config, topology, wishes, **_):
        (tmp_path / "gone").rmdir()
        return made_by_hand()

    (tmp_path / "gone").mkdir()
    monkeypatch.setattr(planning, "make_plan", make_plan)
    figures, page = tmp_path / "gone" / "plan.json", tmp_path / "plan.html"
    assert plan(recipe, f"--json={figures}", f"--html={page}") == 2
    shown = capsys.readouterr()
    assert "chip-hours" in shown.out
    assert shown.err == f"clip-jax: --json {figures} cannot be written: No such file or directory\n"
    assert "<title>" in page.read_text()


def test_a_measured_run_may_be_in_a_bucket(recipe, capsys):
    Bucket.empty()
    assert plan(recipe, "--measured=teststore://bucket/run") == 2
    assert "--measured teststore://bucket/run is no workdir" in capsys.readouterr().err


def test_whether_a_file_can_be_written_is_asked_without_changing_it(recipe, tmp_path):
    kept = tmp_path / "kept.json"
    kept.write_text("kept")
    assert plan(recipe, f"--json={kept}", f"--html={tmp_path / 'new'}", topology="v9:1") == 2
    assert kept.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize(
    ("topology", "modules", "extra"),
    [
        ("v5e:4x4", ("libtpu",), "plan-tpu"),
        ("h100x8", ("jax_cuda13_plugin", "jax_cuda12_plugin"), "plan-cuda"),
    ],
)
def test_a_compiler_that_is_not_installed_is_named_with_its_extra(
    recipe, capsys, monkeypatch, topology, modules, extra
):
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr("sys.path", [])
    assert plan(recipe, topology=topology) == 2
    assert f"pip install 'clip-jax-training[{extra}]'" in capsys.readouterr().err
