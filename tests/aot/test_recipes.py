"""Every recipe compiled for a TPU and a GPU topology that are not there: `make test-aot`.

configs/plans.json, beside the recipes, has for each one topologies, overrides that fit them, and
the codes of findings that are accepted there (docs/planning.md says what they mean). A finding that
is not listed fails the test, and so does one that is listed and gone. A compilation takes up to
minutes and is kept in the cache folder, so the second run of an unchanged step takes seconds.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from recipes import RECIPES, ROOT, make_starts

PLANS = json.loads((ROOT / "configs" / "plans.json").read_text())
COMPILERS = {"tpu": "libtpu", "gpu": "jax_plugins"}
CASES = [
    pytest.param(recipe, platform, id=f"{recipe}-{platform}")
    for recipe in RECIPES
    for platform in COMPILERS
]


def plan(recipe, topology, overrides, folder):
    """The JSON of `clip-jax plan`, in a process of its own, as its compiler needs."""
    output = folder / "plan.json"
    variables = dict(os.environ)
    variables.pop("XLA_FLAGS", None)  # those of the tests' own compilations
    done = subprocess.run(
        [
            *(sys.executable, "-c", "import sys; from clip_jax.cli import main; sys.exit(main())"),
            *("plan", f"--config={RECIPES[recipe]}", f"--topology={topology}"),
            *("--no_search", f"--json={output}", *overrides),
        ],
        cwd=folder,
        env=variables | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert output.exists(), done.stderr
    return done.returncode, json.loads(output.read_text())


def test_every_recipe_has_a_plan_for_both():
    assert set(PLANS) == set(RECIPES)
    assert all(set(plans) == set(COMPILERS) for plans in PLANS.values())


@pytest.mark.aot
@pytest.mark.parametrize(("recipe", "platform"), CASES)
def test_it_fits_and_nothing_new_stands_out(recipe, platform, tmp_path):
    if importlib.util.find_spec(COMPILERS[platform]) is None:
        pytest.skip(f"the {platform} compiler is not installed: make test-aot installs it")
    wanted = PLANS[recipe][platform]
    make_starts(tmp_path)
    code, made = plan(recipe, wanted["topology"], wanted["overrides"], tmp_path)
    assert made["fits"], made["asked"]
    assert made["topology"]["platform"] == platform
    found = {finding["code"]: finding["text"] for finding in made["findings"]}
    assert sorted(found) == sorted(wanted["accepted"]), found
    assert code == 0
    estimate = made["shown"]["estimate"]
    exchanged = [one for one in estimate["traffic"] if one["kind"] == "all-to-all"]
    assert not exchanged
