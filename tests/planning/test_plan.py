"""A plan as a whole: what is shown, searched and swept, with hand-made compilations."""

import dataclasses

import pytest
from planning.plan_cases import MIB, Compiler, config_of, states, step_of

from clip_jax.config import UserError, to_json
from clip_jax.config.load import load_config
from clip_jax.planning.plan import Wishes, plan_with
from clip_jax.planning.plan_setting import Setting
from clip_jax.planning.plan_state import state_bytes
from clip_jax.planning.topology import open_topology


@pytest.fixture(scope="module")
def topology():
    """Eight simulated devices that are told to have little memory."""
    return dataclasses.replace(open_topology("cpu:8"), memory_bytes=100 * MIB)


class CpuCompiler(Compiler):
    def __call__(self, config):
        step = super().__call__(config)
        return step_of(config, total=step.memory.total, platform="cpu")


def plan_of(activations, topology, config=None, **wishes):
    config = config or config_of(mesh=(-1, 1, 1))
    compiler = CpuCompiler(activations * MIB)

    def compile(config):
        return compiler(dataclasses.replace(config, mesh=Setting.of(config, 8).mesh))

    return plan_with(compile, config, topology, Wishes(**wishes)), compiler


def test_what_fits_is_shown_as_it_is(topology):
    plan, compiler = plan_of(20, topology, price_per_chip_hour=2.0)
    assert plan.fits
    assert plan.exit_code == 0
    assert plan.search is None
    assert plan.shown is not None
    assert plan.shown.overrides == ()
    assert plan.shown.estimate.cost.expected == pytest.approx(
        2 * plan.shown.estimate.chip_hours.expected
    )
    assert len(compiler.compiled) == 1


def test_what_does_not_fit_is_searched_for_and_its_overrides_can_be_pasted(topology, tmp_path):
    config = config_of(mesh=(-1, 1, 1))
    plan, _ = plan_of(1000, topology, config)
    assert plan.exit_code == 2
    assert plan.findings[0].code == "does-not-fit"
    assert plan.findings[0].text.endswith(f"; with {' '.join(plan.shown.overrides)} it fits")
    assert plan.shown.overrides
    (tmp_path / "config.json").write_text(to_json(config))
    pasted = [text.replace("'", "") for text in plan.shown.overrides]
    loaded = load_config([f"--config={tmp_path / 'config.json'}", *pasted])
    assert Setting.of(loaded, 8) == plan.shown.setting


def test_a_measured_run_is_of_the_recipe_and_not_of_what_fits_in_its_place(topology):
    plan, _ = plan_of(1000, topology, measured="missing")
    assert plan.shown.estimate.measured is None
    assert "the run in missing is of the recipe as it is, and not compared" in plan.findings[0].text
    assert "not compared" not in plan_of(1000, topology)[0].findings[0].text
    with pytest.raises(UserError, match="missing"):
        plan_of(20, topology, measured="missing")


def test_without_a_search_only_the_recipe_is_compiled(topology):
    plan, compiler = plan_of(1000, topology, searches=False)
    assert plan.search is None
    assert plan.shown is None
    assert len(compiler.compiled) == 1
    assert [finding.code for finding in plan.findings] == ["does-not-fit"]


def test_the_limit_holds_for_the_search_and_for_the_sweep(topology):
    plan, compiler = plan_of(10**6, topology, max_compiles=2, sweep=("remat",))
    assert plan.search.num_compiled <= 2
    assert plan.sweep.num_compiled <= 2
    assert len(compiler.compiled) <= 1 + 2 + 2
    # The sweep starts from what the search knows.
    assert all(point.attempt.verdict == "ruled out" for point in plan.sweep.points[:1])


def test_a_compiler_that_refuses_the_recipe_is_an_error_of_one_line(topology):
    def broken(config):
        raise UserError("the compiler refuses the step: INTERNAL")

    with pytest.raises(UserError, match="refuses the step: INTERNAL"):
        plan_with(broken, config_of(mesh=(-1, 1, 1)), topology, Wishes())


def test_slices_of_the_config_are_those_of_the_topology(topology):
    config = config_of(mesh=(-1, 1, 1), num_slices=2)
    with pytest.raises(UserError, match="num_slices is 2, and topology cpu:8 has 1"):
        plan_of(20, topology, config)
    two = dataclasses.replace(topology, num_slices=2)
    assert plan_of(20, two, config)[0].fits


def test_state_is_split_by_fsdp_and_tensor_and_not_by_data():
    config = config_of()
    of = state_bytes(config)
    whole = of((8, 1, 1))
    assert of((1, 1, 1)) == whole
    assert of((4, 2, 1)).total < 0.7 * whole.total
    assert of((4, 1, 2)).total < of((8, 1, 1)).total
    # AdamW: two moments of each parameter.
    assert 2 * whole.parameters <= whole.rest <= 2 * whole.parameters + 64
    assert states((1, 2, 1)).total == 15 * MIB


def test_overrides_name_what_differs_and_no_more():
    config = config_of(mesh=(-1, 2, 1))
    own = Setting.of(config, 8)
    assert own == Setting((4, 2, 1), 1, "none")
    assert own.overrides(config, 8) == ()
    assert own._replace(remat="full").overrides(config, 8) == ("--config.remat=full",)
    assert own._replace(mesh=(2, 4, 1), microbatches=4).overrides(config, 8) == (
        "--config.mesh='(2, 4, 1)'",
        "--config.microbatches=4",
    )
