"""Every recipe is valid, no default of it changes unseen, and it trains, in small."""

import contextlib
import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from recipes import RECIPES, ROOT, WIDTH, load_recipe, make_pairs, make_starts, shrunk
from small import mesh_of

from clip_jax.checkpoint import CheckpointStore, Workdir, leaves_by_path, read_metrics
from clip_jax.config import ConfigError, ExperimentConfig, to_dict
from clip_jax.config.load import load_config
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.loop import train

GOLDEN = ROOT / "tests" / "golden"
# The run that a recipe goes on from: the small one of another recipe.
STARTS_FROM = {
    "clipa_l14.tune": ("model", "clipa_l14.pretrain"),
    "finetune": ("model", "openai_clip.b32"),
    "flip_l16.tune": ("model", "flip_l16.pretrain"),
    "lit_b16": ("image", "siglip.b16"),
    "openai_clip.l14_336": ("model", "openai_clip.l14"),
}
# Both losses, two optimizers, two kinds of start, a locked tower. A run compiles for 10 s, so the
# others are for `-m slow`.
BY_DEFAULT = {"clipa_l14.pretrain", "clipa_l14.tune", "lit_b16", "siglip.b16"}


@pytest.fixture(autouse=True)
def starts(tmp_path, monkeypatch):
    """The checkpoints that recipes name, where they look for them."""
    make_starts(tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", RECIPES)
def test_resolved_config_is_the_golden_one(name):
    """To accept a change: python tests/golden/regenerate.py"""
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    assert to_dict(load_recipe(name)) == golden


def test_each_golden_config_has_its_recipe():
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_shapes_fit_together(name):
    task = ContrastiveTask(load_recipe(name), mesh_of())
    params, model_state = jax.eval_shape(task.init, jax.random.key(0))
    rng, step = jax.random.key(0), jax.numpy.int32(0)
    loss, _ = jax.eval_shape(
        lambda p, s, b: task.loss(p, s, b, rng=rng, step=step),
        params,
        model_state,
        task.batch_spec(),
    )
    assert loss.shape == ()


def test_the_first_variant_needs_no_name_and_a_wrong_one_is_told():
    paths = {argument.split(":")[0] for argument in RECIPES.values() if ":" in argument}
    for path in paths:
        first, *others = runpy.run_path(path)["VARIANTS"]
        unnamed = load_config([f"--config={path}"])
        assert unnamed == load_config([f"--config={path}:{first}"])
        with pytest.raises(ConfigError, match=rf"no variant 'x'; there are {first}, {others[0]}"):
            load_config([f"--config={path}:x"])


def test_recipes_name_no_place_but_data_and_runs():
    """What a user must bring or override has a path that is easy to tell."""
    for name in RECIPES:
        config = load_recipe(name)
        paths = [
            source.path for source in config.data.sources.values() if source.kind != "quickstart"
        ]
        if config.start.model is None:
            paths.append(config.data.tokenizer.path)
        assert all(path.startswith("data/") for path in paths if path), name
        named = (config.start.model, config.start.image, config.start.text)
        assert all(path.startswith("runs/") for path in named if path), name


# ---- Two steps of each --------------------------------------------------------------------------

Run = Callable[[str], tuple[ExperimentConfig, Workdir]]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Trains a recipe in small, once, after the one that it starts from."""
    folder = tmp_path_factory.mktemp("small")
    make_pairs(folder)
    done: dict[str, tuple[ExperimentConfig, Workdir]] = {}

    def run_once(name: str) -> tuple[ExperimentConfig, Workdir]:
        if name not in done:
            overrides = []
            if name in STARTS_FROM:
                part, other = STARTS_FROM[name]
                # What it brings along must fit before all is made small.
                overrides = [f"--config.start.{part}={run_once(other)[1].path}"]
                overrides += [f"--config.model.embed_dim={WIDTH}"] if part == "image" else []
            config = shrunk(load_recipe(name, *overrides), folder)
            workdir = Workdir(folder / "runs" / name)
            outcome = train(config, workdir)
            assert outcome.finished
            done[name] = config, workdir
        return done[name]

    return run_once


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in BY_DEFAULT else [pytest.mark.slow])
        for name in RECIPES
    ],
)
def test_two_steps_in_small(name, run):
    """Same kinds of towers, loss, optimizer, schedule, augmentation and source as the recipe."""
    config, workdir = run(name)
    lines = [line for line in read_metrics(workdir.metrics) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[0]["learning_rate"] == pytest.approx(config.optimizer.learning_rate, rel=1e-6)
    if name in STARTS_FROM:
        part, other = STARTS_FROM[name]
        before, after = params_of(run(other)[1]), params_of(workdir)
        started = [path for path in before if path in after]
        if part == "image":
            started = [path for path in started if path.startswith("image/")]
        assert len(started) > 10
        moved = largest_move(before, after, started)
        assert moved == 0 if "image" in config.start.lock else 0 < moved < 0.01


def params_of(workdir: Workdir) -> dict[str, np.ndarray]:
    with contextlib.closing(CheckpointStore(workdir.checkpoints)) as store:
        return leaves_by_path(store.load(("params",))["params"])


def largest_move(before: dict, after: dict, paths: list[str]) -> float:
    """Over arrays whose shape is the same in both: positions may be resampled."""
    return max(
        float(np.abs(after[path] - before[path]).max())
        for path in paths
        if after[path].shape == before[path].shape
    )


def test_positions_are_resampled_for_more_pixels_and_longer_captions(run):
    before, after = (params_of(run(f"clipa_l14.{name}")[1]) for name in ("pretrain", "tune"))
    name = "image/position_embedding"
    assert before[name].shape == (1 + 2 * 2, 32)
    assert after[name].shape == (1 + 4 * 4, 32)
    # The class token keeps its place, and the mean over the picture is nearly the same.
    np.testing.assert_allclose(after[name][0], before[name][0], atol=1e-3)
    means = (array[name][1:].mean(axis=0) for array in (before, after))
    np.testing.assert_allclose(*means, atol=1e-3)
    name = "text/position_embedding"
    assert before[name].shape == (4, 32)
    assert after[name].shape == (8, 32)
    means = (array[name].mean(axis=0) for array in (before, after))
    np.testing.assert_allclose(*means, atol=1e-3)


def test_paths_in_the_docstrings_lead_to_recipes():
    for path in sorted((ROOT / "configs").glob("*.py")):
        text = path.read_text()
        assert f"--config=configs/{path.name}" in text or path.stem == "quickstart", path.name
        assert len(text.splitlines()) <= 110
        assert Path(path).read_text().startswith('"""')
