"""The search finds what fits with the least computed again, and compiles little for it."""

import dataclasses
import itertools

import pytest
from planning.plan_cases import MIB, Compiler, config_of, needed_bytes, topology_of, trials_of

from clip_jax.planning.plan_setting import Setting
from clip_jax.planning.search import candidates, what_fits

TOPOLOGY = topology_of()
# (activations of a device in MiB, its memory): from what an fsdp axis mends to what nothing does.
CASES = [(a, m) for a, m in itertools.product((20, 90, 120, 300, 900, 9000), (60, 100, 200))]


def search(compiler, config, limit=100):
    trials = trials_of(compiler, config, limit)
    asked = trials.compile(Setting.of(config, TOPOLOGY.num_devices))
    return asked, what_fits(config, TOPOLOGY, trials)


@pytest.mark.parametrize(("activations", "memory"), CASES)
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_the_first_in_order_that_fits_is_chosen_whatever_is_left_out(activations, memory, remat):
    config = config_of(remat=remat)
    compiler = Compiler(activations * MIB, memory * MIB)
    _, found = search(compiler, config)
    own = Setting.of(config, TOPOLOGY.num_devices)
    order = [setting for setting in candidates(config, TOPOLOGY) if setting != own]
    fitting = [
        setting
        for setting in order
        if needed_bytes(setting.apply(config), compiler.activations) <= compiler.memory
    ]
    assert (found.chosen and found.chosen.setting) == (fitting[0] if fitting else None)
    # What is known rules out most: few of the hundred and more are compiled.
    assert len(order) > 100
    assert len(compiler.compiled) == found.num_compiled + 1 <= 21
    for attempt in found.attempts:
        if attempt.verdict == "ruled out":
            least = needed_bytes(attempt.setting.apply(config), compiler.activations)
            assert compiler.memory < attempt.needed_bytes <= least


def test_what_a_bound_rules_out_by_a_hair_is_compiled():
    """The order in which a compiler lays out arrays moves bounds by a few percent."""

    class Uneven(Compiler):
        def __call__(self, config):
            self.activations = 112 * MIB if config.remat == "dots" else 65 * MIB
            return super().__call__(config)

    compiler = Uneven(0)
    trials = trials_of(compiler, config_of())
    dots = Setting((16, 1, 1), 1, "dots")
    assert trials.attempt(dots).needed_bytes == pytest.approx(107.2 * MIB)
    assert trials.attempt(dots._replace(remat="none")).verdict == "ruled out"
    trials = trials_of(compiler := Uneven(0, 103 * MIB), config_of())
    assert trials.attempt(dots).verdict == "too large"
    assert trials.attempt(dots._replace(remat="none")).verdict != "ruled out"


def test_less_computed_again_comes_first():
    order = candidates(config_of(), TOPOLOGY)
    places = {setting: place for place, setting in enumerate(order)}
    rising = [
        Setting((16, 1, 1), 1, "none"),
        Setting((8, 2, 1), 1, "none"),
        Setting((1, 16, 1), 1, "none"),
        Setting((16, 1, 1), 1, "dots"),
        Setting((1, 16, 1), 1, "dots"),
        Setting((16, 1, 1), 1, "offload"),  # what it sends to the host is most
        Setting((1, 16, 1), 1, "offload"),
        Setting((16, 1, 1), 1, "full"),
        Setting((16, 1, 1), 2, "none"),
        Setting((16, 1, 1), 4, "none"),
        Setting((8, 2, 1), 2, "none"),
        Setting((16, 1, 1), 2, "dots"),
        Setting((16, 1, 1), 2, "full"),
    ]
    assert [places[setting] for setting in rising] == sorted(places[s] for s in rising)


def test_at_the_limit_the_rest_is_counted_as_not_tried():
    compiler = Compiler(9000 * MIB)
    _, found = search(compiler, config_of(), limit=2)
    assert found.num_compiled == 2
    assert len(compiler.compiled) == 3  # the recipe's own is beside the limit
    assert found.chosen is None
    assert found.num_left_out > 0
    _, all_tried = search(Compiler(9000 * MIB), config_of())
    assert all_tried.chosen is None or all_tried.num_left_out == 0


def test_a_compiler_that_breaks_at_some_settings_stops_nothing():
    compiler = Compiler(160 * MIB)
    compiler.fails = {"dots"}
    _, found = search(compiler, config_of())
    assert found.chosen is not None
    assert found.chosen.setting.remat == "offload"
    failed = [attempt for attempt in found.attempts if attempt.verdict == "failed"]
    assert failed
    assert "RuntimeError: INTERNAL: broken <b>" in failed[0].reason


def test_settings_that_the_model_or_the_batch_do_not_take_are_no_candidates():
    config = config_of(mesh=(4, 1, 4), global_batch_size=24)
    config = dataclasses.replace(
        config, evaluation=dataclasses.replace(config.evaluation, batch_size=24)
    )
    for setting in candidates(config, TOPOLOGY):
        assert setting.mesh[2] == 4
        assert 24 % (4 * setting.microbatches) == 0


def test_an_offload_is_no_candidate_on_a_cpu():
    settings = candidates(config_of(), topology_of(memory=None))
    assert {setting.remat for setting in settings} == {"none", "dots", "full"}
