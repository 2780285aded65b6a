"""Benchmarks of whole steps: their arithmetic, their sizes, and what a failure leaves."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from small import small_model

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import end_to_end
import learning_proof
import performance_page
import train_step
from environment import merge_into
from train_step import COMPILED, GPU_BATCH, PEER, Case, Child

BENCHMARKS = Path(train_step.__file__).parent
MACHINE = {"platform": "cpu", "cores": 2}
MEMORIES = (141e9, 94e9, 80e9, 40e9, 24e9)
TOY = Case("toy", small_model(), 16, "float32", None, "cpu")


def row(*seconds, **more):
    return {
        "seconds": list(seconds),
        "medians": [sorted(seconds)[len(seconds) // 2]],
        "peak_host_bytes": 10**9,
        "first_loss": 1.0,
        **more,
    }


def test_ratios_are_of_turns_in_pairs_where_there_are_pairs():
    rows = {
        "ours, padded": row(2.0, 4.0, 3.0, peer_seconds=[4.0, 4.0, 9.0]),
        PEER: row(4.0, 4.0, 9.0, 4.0, 4.0, 5.0),
        COMPILED: row(2.0, 2.0, 2.0, peer_seconds=[4.0, 4.0, 5.0]),
    }
    found = train_step.summary(TOY, rows)["contenders"]
    ours = found["ours, padded"]
    assert ours["ratio_to_eager"] == 2.0
    assert ours["ratio_range"] == [1.0, 3.0]
    assert ours["samples_per_second"] == 16 / 3
    assert ours["ratio_to_compiled"] == 1.0
    assert "ratio_to_eager" not in found[PEER]


def test_elsewhere_every_turn_is_divided_into_every_one_of_the_eager_step():
    eager = row(4.0, 6.0) | {"medians": [4.0, 6.0]}
    found = train_step.summary(TOY, {PEER: eager, "ours, padded": row(2.0)})["contenders"]
    assert found["ours, padded"]["ratio_range"] == [2.0, 3.0]
    assert found["ours, padded"]["ratio_to_eager"] == 2.5
    assert found[PEER]["drift"] == 0.5


def test_the_share_of_the_ceiling_is_of_what_was_computed():
    padded = 3 * sum(train_step.forward_flops(TOY.model))
    peaks = {"ceiling_tflops": 16 * padded / 1e12, "peak_tflops": 32 * padded / 1e12}
    rows = {"ours, packed": row(1.0, flops_per_sample=padded // 2, **peaks), PEER: row(2.0)}
    found = train_step.summary(TOY, rows)["contenders"]
    assert found["ours, packed"]["of_ceiling"] == pytest.approx(0.5, rel=1e-4)
    assert found["ours, packed"]["of_ceiling_padded"] == pytest.approx(1.0)
    assert found["ours, packed"]["mfu"] == pytest.approx(0.25, rel=1e-4)
    assert found[PEER]["of_ceiling"] == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["ours, padded", PEER])
def test_one_that_failed_says_why_and_the_others_have_figures(name, capsys):
    rows = {"ours, padded": row(2.0), "ours, packed": row(1.0), PEER: row(2.0)}
    rows[name] = {"failed": "out of memory", "seconds": [], "medians": []}
    found = train_step.summary(TOY, rows)
    train_step.show("toy", found)
    assert "out of memory" in capsys.readouterr().out
    assert found["contenders"]["ours, packed"]["samples_per_second"] == 16
    page = performance_page.steps({"models": {"toy": {"environment": MACHINE, **found}}})
    assert f"| {name} | out of memory |" in page


def test_on_accelerators_the_eager_step_runs_first_and_last():
    names = ["ours, padded", PEER, COMPILED]
    assert train_step.rounds_of(names, "gpu") == [[PEER], ["ours, padded"], [COMPILED], [PEER]]
    assert train_step.rounds_of(names, "cpu") == [["ours, padded", PEER], [COMPILED, PEER]]
    assert train_step.rounds_of(["ours, padded"], "gpu") == [["ours, padded"]]


def test_nothing_is_begun_when_the_seconds_are_over():
    (*_, rows) = train_step.measure(TOY, ["ours, padded", PEER], 1, 1, seconds=0)
    assert all("--seconds" in found["failed"] for found in rows.values())


def test_what_a_child_raises_is_its_answer(capsys):
    def work():
        raise MemoryError("two\nlines")

    train_step.serve("ours, padded", work)
    answer = json.loads(capsys.readouterr().out.removeprefix(train_step.ANSWER))
    assert answer == {"failed": "MemoryError: two lines"}


def test_a_child_that_ends_without_an_answer_has_failed():
    child = Child("ours, padded", [], os.environ | {"PYTHONHOME": "nowhere"})
    child.turn(1)
    assert child.end() == {"failed": "it ended with exit code 1", "seconds": []}


def test_only_ours_opens_the_device(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert "JAX_PLATFORMS" not in train_step.environ_of("ours, packed", "cache")
    assert train_step.environ_of(PEER, "cache")["JAX_PLATFORMS"] == "cpu"


def test_open_clip_does_not_fall_back_to_the_cpu():
    torch = pytest.importorskip("torch")
    pytest.importorskip("open_clip")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    case = dataclasses.replace(TOY, platform="gpu")
    with pytest.raises(RuntimeError, match="sees no CUDA device"):
        train_step.theirs(case, compiled=False)


@pytest.mark.parametrize("packed", [False, True])
def test_ours_runs_on_one_device_of_eight(packed):
    assert jax.device_count() == 8
    run, wait, figures = train_step.ours(TOY, packed=packed)
    loss = run()
    wait(loss)
    assert figures["num_devices"] == 1
    assert len(loss.sharding.device_set) == 1


@pytest.mark.parametrize("name", GPU_BATCH)
def test_batches_of_gpus_are_packed_without_a_cut(name):
    for memory in MEMORIES:
        batch = train_step.gpu_batch(name, int(memory))
        case = train_step.make_case(name, batch, "bfloat16", None, "gpu")
        small = dataclasses.replace(case.model.image, image_size=case.model.image.patch_size)
        case = dataclasses.replace(case, model=dataclasses.replace(case.model, image=small))
        packing = train_step.choose_packing(case)
        assert batch % packing.group_size == 0
        assert len(train_step.make_batch(case, packing)["eot"]) * packing.group_size == batch
    assert train_step.gpu_batch(name, 141 * 10**9) == GPU_BATCH[name]
    assert train_step.gpu_batch(name, 80 * 10**9) == GPU_BATCH[name] // 2


def test_a_batch_that_no_group_divides_is_refused():
    with pytest.raises(ValueError, match="a batch of 100 is not packed"):
        train_step.choose_packing(dataclasses.replace(TOY, batch=100))


def test_there_are_photos_for_every_batch():
    assert end_to_end.num_photos(200, [32]) == 200
    photos = end_to_end.num_photos(end_to_end.NUM_PHOTOS, GPU_BATCH.values())
    assert photos >= 2 * max(GPU_BATCH.values())
    assert photos % end_to_end.NUM_TARS == 0


def test_results_of_other_models_stay(tmp_path):
    path = tmp_path / "results.json"
    for name, figure in (("a", 1), ("b", 2), ("a", 3)):
        merge_into(path, "models", name, {"figure": figure})
    assert json.loads(path.read_text()) == {"models": {"a": {"figure": 3}, "b": {"figure": 2}}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "key"),
    [
        ("train_step", ("--models", "ViT-B-32", "--repeats", "1"), "models"),
        ("token_reduction", ("--repeats", "1"), "models"),
        ("end_to_end", (), "models"),
        ("attention", ("--models", "ViT-B-32", "--repeats", "1"), "shapes"),
    ],
)
def test_a_script_runs_at_toy_sizes(script, arguments, key, tmp_path):
    output = tmp_path / "results.json"
    command = [sys.executable, BENCHMARKS / f"{script}.py", "--try", "--output", output]
    subprocess.run([*command, *arguments], check=True)
    assert json.loads(output.read_text())[key]


def test_the_learning_proof_tells_a_difference_from_noise():
    scores = {"one": [0.38, 0.39, 0.40], "same": [0.385, 0.39, 0.395], "less": [0.28, 0.29, 0.30]}
    noise, freedom = learning_proof.noise_of(list(scores.values()))
    assert freedom == 6
    assert noise == pytest.approx(0.0087, abs=1e-4)  # deviations 0.01, 0.005 and 0.01
    verdicts = {
        name: learning_proof.judge(scores[name], scores["one"], noise, freedom, 2)
        for name in ("same", "less")
    }
    read = json.loads(json.dumps(verdicts))  # as the script writes them
    assert read["same"]["within_noise"]
    assert not read["less"]["within_noise"]
    assert read["less"]["difference"] == pytest.approx(-0.10)
    # 2.97 of Student's t, 6 degrees of freedom, at 5% for two comparisons together.
    assert read["same"]["limit"] == pytest.approx(2.97 * noise * (2 / 3) ** 0.5, rel=1e-2)
