"""Measured speeds: what is fitted, kept and read again."""

import dataclasses
import json
from collections import Counter

import pytest
from planning.plan_cases import topology_of
from small import small_config, small_model

from clip_jax.config import DataConfig, PackingConfig, UserError
from clip_jax.planning.calibration import (
    Calibration,
    Timing,
    calibrate,
    fit,
    load_calibration,
    save_calibration,
)
from clip_jax.planning.calibration_steps import RunningStep
from clip_jax.planning.estimate_speeds import calibrated_speeds
from clip_jax.planning.hlo import Program
from clip_jax.planning.topology import Topology, open_topology
from clip_jax.planning.traffic import Reader, Work


@pytest.fixture
def topology() -> Topology:
    return open_topology("cpu:1")


def calibration_of(**changes):
    values = {
        "platform": "cpu",
        "device_kind": "a processor",
        "num_cores": 2,
        "num_devices": 1,
        "matmul_flops": {"float32": 100e9, "bfloat16": 50e9},
        "memory_bandwidth": 10e9,
        "products_factor": 1.5,
        "memory_factor": 2.0,
        "seconds_per_instruction": 2e-6,
        "versions": {"jax": "0.1"},
    }
    return Calibration(**(values | changes))


def timing_of(seconds, *parts):
    """parts: (FLOPs, bytes, how often it runs)."""
    return Timing(
        seconds,
        tuple(
            (
                Work(
                    name="w",
                    opcode="dot",
                    flops=Counter({"f32": flops} if flops else {}),
                    num_bytes=num_bytes,
                    host_bytes=0,
                    is_fused=False,
                ),
                times,
            )
            for flops, num_bytes, times in parts
        ),
    )


# Products of 10 GFLOPs, copies of 1 GB, and next to nothing: by the rates 0.1 s each, and 0. Then
# a product that moves more than it computes by the rates, not by the factors.
WIDE = ((10**10, 10**8, 8), (0, 10**9, 2), (0, 8, 2000), (10**10, 12 * 10**8, 3))
NARROW = ((10**10, 10**8, 1), (0, 10**9, 6), (0, 8, 2000))
TINY = ((0, 8, 5000),)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_factors_and_an_overhead_explain_the_steps_that_they_made(num_devices):
    rough = calibration_of(
        products_factor=1.0,
        memory_factor=1.0,
        seconds_per_instruction=0.0,
        num_devices=num_devices,
    )
    truth = calibration_of(products_factor=2.2, memory_factor=1.1, seconds_per_instruction=4e-6)
    speeds = calibrated_speeds(truth, sharing=num_devices)
    timings = []
    for parts in (WIDE, NARROW, TINY):
        work = timing_of(1.0, *parts).work
        seconds = sum(times * speeds.seconds(each) for each, times in work)
        timings.append(Timing(seconds, work))
    found = fit(rough, timings)
    assert found.products_factor == pytest.approx(2.2, rel=1e-3)
    assert found.memory_factor == pytest.approx(1.1, rel=1e-3)
    assert found.seconds_per_instruction == pytest.approx(4e-6, rel=1e-3)


def test_nothing_is_fitted_below_zero_whatever_was_measured():
    rough = calibration_of(products_factor=1.0, memory_factor=1.0, seconds_per_instruction=0.0)
    # The tiny step is faster than nothing could be, and the narrow one than its memory.
    found = fit(rough, [timing_of(2.0, *WIDE), timing_of(0.1, *NARROW), timing_of(1e-9, *TINY)])
    assert found.products_factor > 0
    assert found.memory_factor >= 0
    assert found.seconds_per_instruction >= 0


def test_a_calibration_is_found_again_for_this_machine_and_these_versions(
    topology, tmp_path, monkeypatch
):
    from clip_jax.planning import calibration

    assert load_calibration(topology, tmp_path) is None
    here = calibration_of(
        device_kind=calibration._device_kind(topology.devices[0]),
        num_cores=calibration.num_cores(),
        versions=calibration._versions(),
    )
    path = save_calibration(here, tmp_path)
    assert load_calibration(topology, tmp_path) == here
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.write_text(json.dumps(dataclasses.asdict(here) | {"versions": {"jax": "0"}}))
    assert load_calibration(topology, tmp_path) is None
    save_calibration(here, tmp_path)
    two = dataclasses.replace(topology, devices=topology.devices * 2)
    assert load_calibration(two, tmp_path) == here
    of_two = dataclasses.replace(here, num_devices=2)
    save_calibration(of_two, tmp_path)
    assert load_calibration(two, tmp_path) == of_two
    assert load_calibration(topology, tmp_path) == here
    monkeypatch.setattr(calibration, "num_cores", lambda: 64)
    assert load_calibration(topology, tmp_path) is None


@pytest.mark.parametrize(
    "harm",
    [
        lambda values: "",
        lambda values: "[1]",
        lambda values: json.dumps(values)[:40],
        lambda values: json.dumps(values | {"of_another_version": 1}),
        lambda values: json.dumps({k: v for k, v in values.items() if k != "memory_bandwidth"}),
        lambda values: json.dumps(values | {"memory_bandwidth": 0}),
        lambda values: json.dumps(values | {"matmul_flops": {"float32": 1e9}}),
    ],
    ids=("empty", "list", "cut", "surplus", "lacking", "zero", "dtype"),
)
def test_a_damaged_calibration_is_none_and_said(topology, tmp_path, caplog, harm):
    from clip_jax.planning import calibration

    here = calibration_of(
        device_kind=calibration._device_kind(topology.devices[0]),
        num_cores=calibration.num_cores(),
        versions=calibration._versions(),
    )
    path = save_calibration(here, tmp_path)
    path.write_text(harm(dataclasses.asdict(here)))
    assert load_calibration(topology, tmp_path) is None
    assert f"{path} is damaged: measure again with --calibrate" in caplog.text


def test_simulated_devices_share_a_machine():
    program = Program("""
ENTRY %main (a: f32[1000,1000]) -> f32[1000,1000] {
  %a = f32[1000,1000] parameter(0)
  ROOT %c = f32[1000,1000] dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
""")
    ((work, _),) = Reader(program).work()
    calibration = calibration_of()
    alone = calibrated_speeds(calibration, sharing=1).seconds(work)
    assert alone == pytest.approx(1.5 * 2e9 / 100e9 + 2e-6)
    assert calibrated_speeds(calibration, sharing=2).seconds(work) == pytest.approx(
        2 * 1.5 * 2e9 / 100e9 + 2e-6
    )


def test_devices_that_are_not_there_cannot_be_measured():
    with pytest.raises(UserError, match="its devices are not here"):
        calibrate(topology_of(4))


def smallest_config():
    """A bag of words and one layer: two seconds to compile."""
    model = small_model()
    return small_config(
        model=dataclasses.replace(
            model,
            image=dataclasses.replace(model.image, depth=1),
            text=dataclasses.replace(model.text, kind="cbow", pooling="mean"),
        ),
        data=DataConfig(packing=PackingConfig(group_size=0)),
    )


def test_a_step_runs_on_devices_that_are_there(topology):
    step = RunningStep(smallest_config(), topology.devices)
    step.start()
    assert step.run() > 0
    assert step.run() > 0  # the state was donated, and is its successor now
    assert Program(step.text).flops > 0
