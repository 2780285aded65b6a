import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from small import small_config
from tensorboardX.proto import event_pb2

from clip_jax.checkpoint import Workdir, read_metrics
from clip_jax.config import LoggingConfig, UserError
from clip_jax.data.report import ReportTotals
from clip_jax.training.clock import Clock, split_wait
from clip_jax.training.goodput import Session
from clip_jax.training.recompiles import CompileWatch
from clip_jax.training.telemetry import MetricsWriter, ProgressLine, check_logging, expand
from clip_jax.training.throughput import Throughput, host_memory_in_use


def scalars(folder) -> dict[tuple[str, int], float]:
    """What TensorBoard would read: records of length, checksum, event, checksum."""
    values = {}
    for path in folder.glob("events.*"):
        data, place = path.read_bytes(), 0
        while place < len(data):
            length = int.from_bytes(data[place : place + 8], "little")
            event = event_pb2.Event.FromString(data[place + 12 : place + 12 + length])
            place += length + 16
            for value in event.summary.value:
                values[value.tag, event.step] = value.simple_value
    return values


def test_every_line_goes_everywhere(tmp_path):
    workdir = Workdir(tmp_path)
    writer = MetricsWriter(workdir, small_config(), first_step=0)
    writer.write(1, {"loss": 2.5, "eval/set/R@1": 0.5})
    writer.write(2, {"loss": math.nan})
    writer.close()
    lines = [json.loads(line) for line in workdir.metrics.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.5, "eval/set/R@1": 0.5}, {"step": 2, "loss": None}]
    written = scalars(workdir.tensorboard)
    assert {value for (_, step), value in written.items() if step == 1} == {2.5, 0.5}
    assert math.isnan(written["loss", 2])


def test_lines_are_on_disk_at_once(tmp_path):
    workdir = Workdir(tmp_path)
    writer = MetricsWriter(
        workdir, small_config(logging=LoggingConfig(tensorboard=False)), first_step=0
    )
    writer.write(1, {"loss": 1.0})
    assert workdir.metrics.read_text() == '{"step": 1, "loss": 1.0}\n'
    assert not workdir.tensorboard.exists()
    writer.close()


def test_a_bucket_gets_both(tmp_path):
    workdir = Workdir(f"memory://{tmp_path.name}/run")
    writer = MetricsWriter(workdir, small_config(), first_step=5)
    writer.write(6, {"loss": 2.5})
    writer.flush()
    assert read_metrics(workdir) == [{"step": 6, "loss": 2.5}]
    writer.close()
    copies = tmp_path / "tensorboard"
    copies.mkdir()
    for path in workdir.tensorboard.iterdir():
        (copies / path.name).write_bytes(path.read_bytes())
    assert scalars(copies) == {("loss", 6): 2.5}


def test_vectors_become_a_number_for_each_layer():
    metrics = {
        "loss": np.float32(2.5),
        "gradient_norm/image/blocks": np.array([1.0, 2.0], np.float32),
        "skipped_steps": np.int32(3),
    }
    assert expand(metrics) == {
        "loss": 2.5,
        "gradient_norm/image/blocks/0": 1.0,
        "gradient_norm/image/blocks/1": 2.0,
        "skipped_steps": 3.0,
    }
    assert all(type(value) is float for value in expand(metrics).values())


def test_docs_name_every_field():
    """Of those that do not come from the step or an evaluation."""
    text = (Path(__file__).parents[2] / "docs" / "telemetry.md").read_text()
    names = set(re.findall(r"`([^`\s]+)`", text))
    names |= {f"data_wait{name}" for name in names if name.startswith("/")}
    run = Throughput(
        global_batch_size=1, flops_per_sample=1, num_chips=1, peak_tflops=1.0, measured_tflops=1.0
    )
    clock = Clock(0, session=Session(), compiles=CompileWatch(print))
    fields = clock.lap(1, local_batch_size=1) | ReportTotals().stats()
    fields |= split_wait(fields) | run.figures(1.0) | host_memory_in_use()
    assert not fields.keys() - names


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    """Offline, and twice as after a resume: with a config that has changed."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    workdir = Workdir(tmp_path)
    for microbatches in (1, 2):
        config = small_config(
            microbatches=microbatches, logging=LoggingConfig(wandb_project="p", tensorboard=False)
        )
        writer = MetricsWriter(workdir, config, first_step=0)
        writer.write(1, {"loss": 2.5})
        writer.write(2, {"loss": math.nan})
        writer.close()
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert len({name.split("-")[3] for name in runs}) == 1  # one id


def test_wandb_that_is_not_installed_names_the_extra():
    check_logging(small_config())
    config = small_config(logging=LoggingConfig(wandb_project="p"))
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(UserError, match=r"clip-jax-training\[wandb\]"):
            check_logging(config)
    else:
        check_logging(config)


def test_plain_lines_where_there_is_no_terminal(capsys):
    progress = ProgressLine(first_step=0, num_steps=100)
    values = {"loss": 1.25, "samples_per_second": 2000.0, "data_wait": 0.1, "eta_seconds": 3661}
    progress.update(10, values)
    progress.update(20, values)  # too soon after the last one
    progress.say("[not] markup")
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "step 10/100  loss 1.2500  2,000 samples/s  data wait 10%  ETA 01:01:01",
        "[not] markup",
    ]


def test_all_of_a_long_run_fits_into_a_line(capsys):
    progress = ProgressLine(num_steps=195_000)
    values = {
        "loss": 12.3456,
        "samples_per_second": 123_456.0,
        "samples_per_second_per_chip": 482.25,
        "mfu": 0.413,
        "mfu_measured": 0.5,
        "data_wait": 0.104,
        "data_wait/tokenize": 0.1,
        "goodput": 0.914,
        "restarts": 3.0,
        "eta_seconds": 90_061.0,
    }
    progress.update(100_000, values)
    progress.close()
    line = capsys.readouterr().err.rstrip("\n")
    assert line == (
        "step 100000/195000  loss 12.3456  123k samples/s (482/chip)  MFU 41%  "
        "data wait 10% (tokenize)  goodput 91%  ETA 1d 01h"
    )
    assert len(line) < 120


def test_goodput_is_shown_after_a_restart_and_the_measured_mfu_where_there_is_no_other(capsys):
    progress = ProgressLine(num_steps=10)
    values = {"loss": 1, "samples_per_second": 2.5, "data_wait": 0, "eta_seconds": 0}
    progress.update(10, values | {"goodput": 0.5, "restarts": 0.0, "mfu_measured": 0.25})
    progress.close()
    assert capsys.readouterr().err == (
        "step 10/10  loss 1.0000  2.5 samples/s  MFU 25%  data wait 0%  ETA 00:00:00\n"
    )


@pytest.mark.parametrize(("wait", "shown"), [(0.1, "10% (decode)"), (0.01, "1%")])
def test_what_the_data_waits_for(capsys, wait, shown):
    progress = ProgressLine(first_step=0, num_steps=100)
    values = {"loss": 1, "samples_per_second": 1, "data_wait": wait, "eta_seconds": 0}
    shares = {"data_wait/read": 0.01, "data_wait/decode": 0.09, "data/read_ms": 7.0}
    progress.update(1, values | shares)
    progress.close()
    assert f"data wait {shown}  ETA" in capsys.readouterr().err


def test_all_processes_but_the_first_are_silent(capsys):
    progress = ProgressLine(first_step=0, num_steps=100, silent=True)
    progress.update(1, {"loss": 1, "samples_per_second": 1, "data_wait": 0, "eta_seconds": 1})
    progress.say("nothing")
    progress.close()
    assert capsys.readouterr().err == ""
