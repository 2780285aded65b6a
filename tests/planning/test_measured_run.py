"""Runs that an estimate is compared with: their speed, and which are of another step or machine."""

import dataclasses
import json

import pytest
from checkpoint.buckets import Bucket
from planning.plan_cases import config_of, topology_of
from small import small_config

from clip_jax.config import (
    DataConfig,
    LossConfig,
    OptimizerConfig,
    PackingConfig,
    UserError,
    to_json,
)
from clip_jax.planning.measured_run import compare

CONFIG = config_of(mesh=(16, 1, 1))
TOPOLOGY = topology_of()  # 16 v5e, 197 TFLOP/s each
FLOPS = 10**9  # of a sample


def line_of(steps_per_second=1.0, *, num_chips=16, peak=197e12, **changes):
    """As a run logs it."""
    per_chip = 512 * steps_per_second / num_chips
    figures = {
        "steps_per_second": steps_per_second,
        "samples_per_second": 512 * steps_per_second,
        "samples_per_second_per_chip": per_chip,
    }
    if peak is not None:
        figures["mfu"] = per_chip * FLOPS / peak
    return figures | changes


def write_run(folder, lines, config=CONFIG):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def compared(run, config=CONFIG, topology=TOPOLOGY, *, seconds=1.0, flops=FLOPS):
    return compare(run, config, topology, expected_seconds=seconds, flops_per_sample=flops)


LINES = [
    line_of(0.1, step=10),
    line_of(4.0, step=20, data_wait=0.2),
    {"step": 25, "eval/coco/recall": 0.5},
    line_of(5.0, step=30, data_wait=0.0),
    line_of(2.0, step=40, data_wait=0.5),
]


def test_a_run_is_compared_without_its_first_line_and_its_waits(tmp_path):
    run = write_run(tmp_path / "run", LINES)
    measured = compared(run, seconds=0.25)
    assert measured.workdir == run
    assert measured.steps_per_second == pytest.approx(5.0)
    assert measured.error == pytest.approx(0.25)


def test_a_run_in_a_bucket_is_compared_too():
    run = "teststore://bucket/run"
    try:
        Bucket().pipe_file("/bucket/run/config.json", to_json(CONFIG).encode())
        lines = "".join(json.dumps(line) + "\n" for line in LINES)
        Bucket().pipe_file("/bucket/run/metrics.jsonl", lines.encode())
        assert compared(run).workdir == run
    finally:
        Bucket.empty()


@pytest.mark.parametrize(
    "end", ['{"step": 50, "steps_per', "[1]", '"x"', "\x00\x00", '{"steps_per_second": "fast"}']
)
def test_what_is_no_line_of_a_log_is_passed_over(tmp_path, end):
    """A run that was killed ends in the middle of one."""
    run = write_run(tmp_path / "run", LINES)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(end)
    assert compared(run).steps_per_second == pytest.approx(5.0)


def changed(**changes):
    return dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(global_batch_size=1024), "global_batch_size is 1024, not 512"),
        (changed(remat="dots"), "remat is dots, not none"),
        (changed(mesh=(4, 4, 1)), r"mesh is \(4, 4, 1\), not \(16, 1, 1\)"),
        (changed(mesh=(8, 1, 1)), r"was not on 16 devices, .*\(8, 1, 1\) needs 8 devices"),
        (changed(loss=LossConfig(kind="sigmoid")), "loss.kind is sigmoid, not softmax"),
        (changed(optimizer=OptimizerConfig(name="lion")), "optimizer.name is lion, not adamw"),
        (
            changed(optimizer=OptimizerConfig(ema_decay=0.99)),
            "optimizer.ema_decay is a number, not None",
        ),
        (
            changed(data=DataConfig(packing=PackingConfig(group_size=8, rows=3))),
            "data.packing.group_size is 8, not 0",
        ),
    ],
)
def test_a_run_of_another_step_is_not_compared(tmp_path, config, message):
    run = write_run(tmp_path / "run", LINES, config)
    with pytest.raises(UserError, match=message) as error:
        compared(run)
    assert "\n" not in str(error.value)


def test_rates_and_the_mesh_as_it_is_spelled_change_no_speed(tmp_path):
    config = changed(mesh=(-1, 1, 1), optimizer=OptimizerConfig(learning_rate=1e-5), name="other")
    same = compared(write_run(tmp_path / "same", LINES))
    other = compared(write_run(tmp_path / "other", LINES, config))
    assert other.error == same.error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (line_of(num_chips=8), "was on 8 chips, and made:by-hand has 16"),
        (line_of(peak=918e12), "chips of 918 TFLOP/s, and a TPU v5e has 197"),
        (line_of(peak=None), "it logged no MFU, as runs on CPUs do"),
        ({"step": 1}, "has logged no steps_per_second"),
    ],
)
def test_a_run_on_other_hardware_is_not_compared(tmp_path, line, message):
    run = write_run(tmp_path / "run", [line])
    with pytest.raises(UserError, match=message):
        compared(run)


def test_a_run_on_chips_is_none_on_cpus(tmp_path):
    cpus = topology_of(memory=None)
    on_cpus = write_run(tmp_path / "cpus", [line_of(num_chips=1, peak=None)])
    compared(on_cpus, topology=cpus)
    on_a_chip = write_run(tmp_path / "chip", [line_of(num_chips=1)])
    with pytest.raises(UserError, match="it logged the MFU of a chip"):
        compared(on_a_chip, topology=cpus)


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no config.json"):
        compared(str(tmp_path), small_config())
