"""A guard of speed that no timer decides: what each recipe's compiled step costs, in counts.

FLOPs, bytes of state and traffic must be those of tests/counts.json, which were seen with the JAX
that is named there. Under another one XLA may do the same in another way, so FLOPs and state alone
are compared, to 2%. To accept a change that is meant, then read its diff (`-k` for some of them):

    WRITE_COUNTS=1 .venv/bin/python -m pytest -n 0 -m "" tests/test_counts.py
"""

import dataclasses
import json
import os
from pathlib import Path

import jax
import pytest
from counts import PACKED_BATCH, Step, packed, small_step_config
from recipes import RECIPES, load_recipe, make_pairs, make_starts

FILE = Path(__file__).with_name("counts.json")
GOLDEN = json.loads(FILE.read_text())
# Compiled FLOPs over those that training needs. The loss is half a percent of such small steps.
MOST_OVER_ANALYTIC = 1.01
# Both ranks of the tensor axis embed the patches of the locked image tower, forward alone: 3% of a
# step at this size, 0.3% of ViT-B/16's. To share it they would gather all tokens.
MOST_OF_LIT = 1.04
# The analytic count takes padding for pixels. Convolutions are not split over the tensor axis: its
# devices share the rows instead. Without, each would compute all of them: 1.39.
MOST_OF_RESNETS = 0.999
MOST = {"lit_b16": MOST_OF_LIT, "openai_clip.rn50": MOST_OF_RESNETS}
# The product that gives packed rows their positions, and the last block's queries, which look at
# all rows of their group, are up to 4%; 0.2% of ViT-B/32's text tower.
MOST_OF_PACKED = 1.04
# One of each kind; the others take the same paths at other sizes.
BY_DEFAULT = ("openai_clip.b32", "siglip.b16")
PACKED = ("openai_clip.b32", "quickstart")  # as runs of causal towers are by default


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_starts(tmp_path)
    make_pairs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow)
        for name in RECIPES
    ],
)
def test_a_step_costs_what_it_did(folder, name):
    step = Step(small_step_config(load_recipe(name), folder))
    check(name, step, most=MOST.get(name, MOST_OVER_ANALYTIC))


@pytest.mark.parametrize("name", PACKED)
def test_a_step_of_packed_text_costs_what_it_did(folder, name):
    """And what it saves of the padded one is the share of the rows that are gone."""
    config = small_step_config(load_recipe(name), folder)
    with_packing = packed(config)
    assert with_packing.data.packing.group_size == 8
    step = Step(with_packing)
    padded = Step(dataclasses.replace(config, global_batch_size=PACKED_BATCH))
    saved, expected = padded.flops - step.flops, padded.analytic_flops - step.analytic_flops
    # Positions are a product in packed rows alone.
    assert expected > 0
    assert saved == pytest.approx(expected, rel=0.1)
    check(f"{name}, packed", step, most=MOST_OF_PACKED)


def check(name, step, *, most):
    assert step.flops_over_analytic <= most
    assert step.compilations_of_two_steps() == 1
    found = step.counts()
    if os.environ.get("WRITE_COUNTS"):
        GOLDEN["jax"], GOLDEN["recipes"][name] = jax.__version__, found
        FILE.write_text(json.dumps(GOLDEN, indent=1, sort_keys=True) + "\n")
        pytest.skip("written")
    golden = GOLDEN["recipes"][name]
    if jax.__version__ != GOLDEN["jax"]:
        for key in ("flops", "state_bytes"):
            assert found[key] == pytest.approx(golden[key], rel=0.02), key
        return
    # The order in which XLA lays buffers out depends on the processor too.
    assert found.pop("temporary_bytes") == pytest.approx(golden.pop("temporary_bytes"), rel=0.1)
    assert found == golden


@pytest.mark.parametrize("name", RECIPES)
def test_none_was_written_that_computes_what_training_does_not_need(name):
    """Of the figures in the file, as most recipes are compiled by the slow tests alone."""
    most = MOST.get(name, MOST_OVER_ANALYTIC)
    assert GOLDEN["recipes"][name]["flops_over_analytic"] <= most
