import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from small import small_config

from clip_jax.checkpoint import Workdir
from clip_jax.config import ConfigError, LoggingConfig
from clip_jax.training.profiling import Profiler, parse_profile_steps


@pytest.mark.parametrize(
    ("text", "steps"), [("10:15", (10, 15)), ("1:1", (1, 1)), (" 3:20 ", (3, 20))]
)
def test_steps_on_the_command_line(text, steps):
    assert parse_profile_steps(text) == steps


@pytest.mark.parametrize("text", ["", "10", "15:10", "0:3", "-1:3", "a:b", "1:2:3", "10,15"])
def test_steps_that_are_none_are_named(text):
    with pytest.raises(ConfigError, match=r"--profile_steps=.* is not FIRST:LAST.*10:15"):
        parse_profile_steps(text)


def train(config, workdir, first_step, last_step):
    """The steps that a trace was running in after `after`, and what was said."""
    said, running = [], []
    profiler = Profiler(config, workdir, first_step=first_step, say=said.append)
    for step in range(first_step + 1, last_step + 1):
        profiler.before(step)
        result = jnp.ones(()) * step
        if profiler._running is not None:
            running.append(step)
        profiler.after(step, {"loss": result})
    profiler.close()
    return running, said


def traced_steps(folder) -> set[int]:
    """The step numbers in the traces below a folder."""
    steps = set()
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    stats = dict(event.stats)
                    if "step_num" in stats:
                        steps.add(int(stats["step_num"]))
    return steps


def config_of(*steps):
    return small_config(num_steps=8, logging=LoggingConfig(profile_steps=steps or None))


def test_a_trace_holds_its_steps_and_no_others(tmp_path):
    running, said = train(config_of(3, 4), Workdir(tmp_path), 0, 8)
    assert running == [3, 4]
    assert traced_steps(tmp_path / "profile") == {3, 4}
    assert list((tmp_path / "profile").rglob("*.trace.json.gz"))
    assert len(said) == 1
    assert str(tmp_path / "profile") in said[0]


def test_a_run_that_ends_within_the_steps_has_a_part(tmp_path):
    running, said = train(config_of(3, 6), Workdir(tmp_path), 0, 4)
    assert running == [3, 4]
    assert traced_steps(tmp_path / "profile") == {3, 4}
    assert len(said) == 1
    assert "trace of steps 3 to 4 in " in said[0]


@pytest.mark.parametrize(
    ("steps", "first_step", "message"),
    [
        ((3, 4), 4, "no trace: .* 3:4 lies before step 4, where the run resumes"),
        ((9, 12), 0, "no trace: .* 9:12 is after the last step, 8"),
        ((), 0, None),
    ],
    ids=["before", "after", "none"],
)
def test_no_trace_and_why(tmp_path, steps, first_step, message):
    running, said = train(config_of(*steps), Workdir(tmp_path), first_step, 8)
    assert running == []
    assert not (tmp_path / "profile").exists()
    assert len(said) == (message is not None)
    if message is not None:
        assert re.search(message, said[0])


def test_what_is_left_of_the_steps_is_traced(tmp_path):
    running, said = train(config_of(3, 6), Workdir(tmp_path), 4, 8)
    assert running == [5, 6]
    assert "the trace begins at step 5, where the run resumes" in said[0]
    assert "trace of steps 5 to 6 in " in said[1]


def test_the_other_processes_trace_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    config = dataclasses.replace(config_of(3, 4))
    assert train(config, Workdir(tmp_path), 0, 8) == ([], [])
