"""Every recipe compiled for a TPU and a GPU topology that are not there: `make test-aot`.

configs/plans.json, beside the recipes, has for each one topologies, overrides that fit them, and
the codes of findings that are accepted there (docs/planning.md says what they mean). A finding that
is not listed fails the test, and so does one that is listed and gone. A compilation takes up to
minutes and is kept in the cache folder, so the second run of an unchanged step takes seconds.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
from recipes import RECIPES, ROOT, load_recipe, make_starts

from clip_jax.config import check_devices
from clip_jax.parallel.chips import CHIPS
from clip_jax.planning.assumed import assume
from clip_jax.planning.findings_shapes import Shapes, shape_findings
from clip_jax.planning.topology import parse_topology

PLANS = json.loads((ROOT / "configs" / "plans.json").read_text())
COMPILERS = {"tpu": "libtpu", "gpu": "jax_plugins"}
BY_SHAPES = ("narrow-", "padded-", "few-", "loss-tile")  # codes of `shape_findings`
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


def chip_of(kind):
    """The data sheet of a topology's chips: `v5p`, `h100`."""
    names = (f"TPU {kind}", kind.upper())
    return next(chip for chip in CHIPS if chip.name.split(" SXM")[0] in names)


@pytest.mark.parametrize(("recipe", "platform"), CASES)
def test_what_stands_out_by_shapes_is_listed(recipe, platform, tmp_path, monkeypatch):
    """The part of the test below that needs no compiler."""
    monkeypatch.chdir(tmp_path)
    make_starts(tmp_path)
    wanted = PLANS[recipe][platform]
    topology = parse_topology(wanted["topology"])
    chip = chip_of(topology.kind)
    num_devices = math.prod(topology.shape) * topology.num_slices * chip.num_devices
    config, _ = assume(load_recipe(recipe, *wanted["overrides"]), num_devices)
    data, fsdp, _ = check_devices(config, num_devices)
    rows = config.global_batch_size // (data * fsdp)
    found = {code for code, _ in shape_findings(Shapes(config, platform, chip, rows))}
    assert found == {code for code in wanted["accepted"] if code.startswith(BY_SHAPES)}


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
