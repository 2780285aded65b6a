"""Every recipe is valid, and no default of it changes unseen."""

import json
from pathlib import Path

import jax
import pytest
from small import mesh_of, small_config

from clip_jax.config import to_dict, to_json
from clip_jax.config.load import load_config
from clip_jax.tasks import ContrastiveTask

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.py"))


@pytest.fixture(autouse=True)
def imported(tmp_path, monkeypatch):
    """The checkpoint that a fine-tuning recipe starts from, where it looks for it."""
    workdir = tmp_path / "runs" / "imported"
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(to_json(small_config()))
    (workdir / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_resolved_config_is_the_golden_one(path):
    """To accept a change: clip-jax config --config=configs/X.py > tests/golden/X.json"""
    golden = json.loads((ROOT / "tests" / "golden" / f"{path.stem}.json").read_text())
    assert to_dict(load_config([f"--config={path}"])) == golden


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shapes_fit_together(path):
    task = ContrastiveTask(load_config([f"--config={path}"]), mesh_of())
    params, model_state = jax.eval_shape(task.init, jax.random.key(0))
    rng, step = jax.random.key(0), jax.numpy.int32(0)
    loss, _ = jax.eval_shape(
        lambda p, s, b: task.loss(p, s, b, rng=rng, step=step),
        params,
        model_state,
        task.batch_spec(),
    )
    assert loss.shape == ()


def test_there_are_recipes():
    assert RECIPES
