"""The grid, the frontier, and that nothing of it stops a sweep."""

import dataclasses
import math
from collections import Counter

import pytest
from planning.plan_cases import (
    MIB,
    Compiler,
    config_of,
    estimate_of,
    needed_bytes,
    topology_of,
    trials_of,
)

from clip_jax.config import UserError
from clip_jax.planning.plan_setting import Setting
from clip_jax.planning.sweep import grid, parse_axes, run_sweep

TOPOLOGY = topology_of()
ALL = ("mesh", "microbatches", "remat")


def test_axes_come_in_their_own_order_and_others_are_refused():
    assert parse_axes("remat, mesh") == ("mesh", "remat")
    with pytest.raises(UserError, match="'precision' is none of mesh,microbatches,remat"):
        parse_axes("mesh,precision")


def test_the_grid_has_what_divides_and_nothing_else():
    config = config_of()
    settings = grid(config, TOPOLOGY, ALL)
    assert len(settings) == len(set(settings))
    for data, fsdp, tensor in {setting.mesh for setting in settings}:
        assert data * fsdp * tensor == 16
        assert tensor in (1, 2, 4)  # heads: 4, and a host has 4 devices
    assert {setting.mesh[2] for setting in settings} == {1, 2, 4}
    assert {setting.mesh[1] for setting in settings} == {1, 2, 4, 8, 16}
    for setting in settings:
        rows = 512 // math.prod(setting.mesh[:2]) // setting.microbatches
        assert rows >= 8
    heads = dataclasses.replace(config.model.image, num_heads=2)
    narrow = dataclasses.replace(config, model=dataclasses.replace(config.model, image=heads))
    assert {setting.mesh[2] for setting in grid(narrow, TOPOLOGY, ALL)} == {1, 2}


def test_tensor_stays_within_a_host():
    topology = topology_of(12)  # on three hosts
    config = config_of(mesh=(4, 1, 3), global_batch_size=480)
    model, batch = config.model, dataclasses.replace(config.evaluation, batch_size=480)
    towers = {
        name: dataclasses.replace(getattr(model, name), width=96, num_heads=12)
        for name in ("image", "text")
    }
    config = dataclasses.replace(
        config, model=dataclasses.replace(model, **towers), evaluation=batch, mesh=(12, 1, 1)
    )
    assert {s.mesh[2] for s in grid(config, topology, ("mesh",))} == {1, 2, 4}


def test_an_axis_that_is_not_named_stays_as_in_the_recipe():
    config = config_of(mesh=(4, 4, 1), microbatches=2, remat="dots")
    settings = grid(config, TOPOLOGY, ("remat",))
    assert {setting[:2] for setting in settings} == {((4, 4, 1), 2)}
    assert {setting.remat for setting in settings} == {"none", "dots", "offload", "full"}
    # Its own setting is there, though no grid would have it.
    odd = config_of(mesh=(4, 4, 1), microbatches=32)
    assert Setting((4, 4, 1), 32, "none") in grid(odd, TOPOLOGY, ("mesh", "microbatches"))


def test_points_that_fit_come_by_speed_and_the_frontier_is_what_nothing_beats():
    compiler = Compiler(160 * MIB)
    config = config_of()
    found = run_sweep(config, TOPOLOGY, ALL, trials_of(compiler, config), estimate_of)
    fitting = [p for p in found.points if p.samples_per_second is not None]
    speeds = [p.samples_per_second for p in fitting]
    assert speeds == sorted(speeds, reverse=True)
    assert [p.attempt.fits for p in found.points] == [True] * len(fitting) + [False] * (
        len(found.points) - len(fitting)
    )
    ruled_out = [p.attempt for p in found.points if p.attempt.verdict == "ruled out"]
    assert ruled_out
    for attempt in ruled_out:
        needed = needed_bytes(attempt.setting.apply(config), compiler.activations)
        assert compiler.memory < attempt.needed_bytes <= needed
    frontier = [p for p in fitting if p.on_frontier]
    assert frontier
    for point in fitting:
        beaten = any(
            other.samples_per_second >= point.samples_per_second
            and other.attempt.needed_bytes <= point.attempt.needed_bytes
            and (other.samples_per_second, other.attempt.needed_bytes)
            != (point.samples_per_second, point.attempt.needed_bytes)
            for other in fitting
        )
        assert point.on_frontier is not beaten
    # 1,024 FLOPs on each of 16 devices, 16 needed for each of 512 samples: one more than needed.
    assert {p.recomputed for p in fitting} == {1.0}
    assert all(p.attempt.step is None for p in found.points)


def test_points_that_fail_are_lines_of_the_table():
    compiler = Compiler(10 * MIB)
    compiler.fails = {"dots"}
    config = config_of()

    def judge(step):
        if step.remat == "full":
            raise ValueError("cannot tell how often a loop runs")
        return estimate_of(step)

    found = run_sweep(config, TOPOLOGY, ("remat",), trials_of(compiler, config), judge)
    verdicts = {p.attempt.setting.remat: p.attempt for p in found.points}
    assert verdicts["none"].fits
    assert verdicts["dots"].verdict == verdicts["full"].verdict == "failed"
    assert "RuntimeError" in verdicts["dots"].reason
    assert verdicts["full"].reason == "ValueError: cannot tell how often a loop runs"


def test_a_limit_leaves_no_axis_out():
    """Of each value of each axis about as many are compiled, those that compute least again."""
    compiler = Compiler(10 * MIB)
    config = config_of()
    everything = grid(config, TOPOLOGY, ALL)
    told = []
    trials = trials_of(compiler, config, limit=12)
    found = run_sweep(
        config, TOPOLOGY, ALL, trials, estimate_of, seconds=90.0, progress=told.append
    )
    count = len(everything)
    assert told == [
        f"sweep: {count} settings, at most 12 compiled: some 18 min, at 90 s each; "
        f"--max_compiles={count} compiles all"
    ]
    assert len(compiler.compiled) == found.num_compiled == 12
    assert len(found.points) == count
    assert found.num_left_out == count - 12
    tried = [p.attempt.setting for p in found.points if p.attempt.fits]
    for values, most in (
        ([s.remat for s in tried], 3),
        ([s.microbatches for s in tried], 3),
        ([s.mesh for s in tried], 1),
    ):
        numbers = Counter(values)
        assert max(numbers.values()) <= most, numbers
    assert {s.microbatches for s in tried} == {s.microbatches for s in everything}
    assert {s.remat for s in tried} == {s.remat for s in everything}
    assert everything[0] in tried


def test_within_the_limit_the_grid_is_compiled_in_its_order():
    """What keeps most comes first: what needs as much is ruled out by it."""
    compiler = Compiler(10 * MIB)
    config = config_of()
    told = []
    trials = trials_of(compiler, config, limit=10**6)
    found = run_sweep(config, TOPOLOGY, ALL, trials, estimate_of, progress=told.append)
    settings = [Setting.of(each, 16) for each in compiler.compiled]
    assert settings == grid(config, TOPOLOGY, ALL)
    assert found.num_left_out == 0
    assert told == [f"sweep: {len(settings)} settings, at most {len(settings)} compiled"]
