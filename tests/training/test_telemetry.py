import importlib.util
import json
import math

import pytest
from small import small_config
from tensorboardX.proto import event_pb2

from clip_jax.checkpoint import Workdir
from clip_jax.config import LoggingConfig, UserError
from clip_jax.training.telemetry import MetricsWriter, ProgressLine, check_logging


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
