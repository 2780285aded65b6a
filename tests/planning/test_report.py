"""The report as text, as JSON and as a page, of plans made by hand."""

import dataclasses
import json
from html.parser import HTMLParser

import pytest
from planning.plan_cases import (
    MIB,
    Compiler,
    config_of,
    estimate_of,
    states,
    step_of,
    topology_of,
    trials_of,
)

from clip_jax.planning.estimate import Range
from clip_jax.planning.findings import Finding
from clip_jax.planning.measured_run import Measured
from clip_jax.planning.page import render_plan_page, write_plan_page
from clip_jax.planning.plan import Judged, Plan
from clip_jax.planning.plan_setting import Attempt, Setting
from clip_jax.planning.report import sections, text
from clip_jax.planning.report_json import to_json
from clip_jax.planning.search import what_fits
from clip_jax.planning.sweep import run_sweep

TOPOLOGY = topology_of()
NASTY = "</script><b>x</b> & \"quotes\" 'n' <img src=x onerror=alert(1)> {{title}}"
VOID = {"meta", "link", "img", "rect", "line", "circle", "polyline"}


class Nesting(HTMLParser):
    """Fails where tags do not nest; keeps tags and text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(content)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def judged(step, overrides=(), findings=(), **estimated):
    setting = Setting.of(step.config, 16)
    estimate = estimate_of(step, **estimated)
    return Judged(
        setting=setting,
        overrides=overrides,
        step=step,
        estimate=estimate,
        findings=tuple(findings),
    )


def fitting(name="small", findings=(), sweep=None, **estimated):
    config = config_of(mesh=(4, 4, 1), name=name)
    step = step_of(config)
    asked = Attempt(
        setting=Setting.of(config, 16), verdict="fits", needed_bytes=step.memory.total, step=step
    )
    return Plan(
        config=config,
        topology=TOPOLOGY,
        asked=asked,
        state=states((4, 4, 1)),
        shown=judged(step, findings=findings, **estimated),
        sweep=sweep,
    )


@pytest.fixture(scope="module")
def lacking() -> Plan:
    """A recipe that a TPU's compiler refuses, and what fits in its place."""
    config = config_of(mesh=(16, 1, 1))
    compiler = Compiler(170 * MIB)
    trials = trials_of(compiler, config)
    asked = trials.compile(Setting.of(config, 16))
    search = what_fits(config, TOPOLOGY, trials)
    chosen = search.chosen
    return Plan(
        config=config,
        topology=TOPOLOGY,
        asked=asked,
        state=states((16, 1, 1)),
        shown=judged(chosen.step, chosen.setting.overrides(config, 16)),
        search=search,
    )


def test_a_frontier_of_some_of_the_grid_says_so():
    config = config_of(mesh=(4, 4, 1))
    axes = ("mesh", "remat")
    whole = run_sweep(
        config, TOPOLOGY, axes, trials_of(Compiler(10 * MIB), config, limit=100), estimate_of
    )
    assert "* no other needs less memory and is as fast\n" in text(fitting(sweep=whole), width=200)
    few = run_sweep(
        config, TOPOLOGY, axes, trials_of(Compiler(10 * MIB), config, limit=5), estimate_of
    )
    count = len(few.points)
    said = f"and is as fast, of those compiled: {count - 5} of {count} were not tried"
    assert said in text(fitting(sweep=few), width=200)


@pytest.fixture(scope="module")
def swept():
    config = config_of(mesh=(4, 4, 1))
    trials = trials_of(Compiler(400 * MIB), config)
    return run_sweep(config, TOPOLOGY, ("mesh", "microbatches", "remat"), trials, estimate_of)


def test_what_goes_to_the_host_has_a_row_and_bounds_a_step():
    plan = fitting(host_bytes=16 * 10**9, host_seconds=0.5, bound_by="host")
    lines = text(plan, width=100).splitlines()
    assert "  to and from the host        16 GB: 500 ms" in lines
    assert any(line.endswith("bound by transfers to and from the host") for line in lines)
    figures = to_json(plan)["shown"]["estimate"]
    assert (figures["host_bytes"], figures["host_seconds"]) == (16 * 10**9, 0.5)
    assert "the host" not in text(fitting(), width=100)


def test_a_plan_that_fits_tells_memory_time_and_cost():
    plan = fitting(
        cost=Range(1728.0, 1920.0, 2304.0),
        measured=Measured(workdir="runs/a", steps_per_second=9.0, error=-0.1),
    )
    shown = text(plan, width=100)
    assert plan.exit_code == 0
    assert shown.startswith("small on made:by-hand: fits: 50 MiB of 100 MiB a device; 5,120 samp")
    for line in (
        "  devices                     16 TPU v5e, 4 hosts",
        "  batch                       512: 32 pairs a device",
        "  parameters                      10 MiB   20%",
        "  all, at the peak                50 MiB of 100 MiB: 50%",
        # 1,024 of 16 x 512 / 16 that are counted for each device.
        "  FLOPs                       1.02 k a device: 2.000 x the analytic count (3 x forward)",
        "  step time                   100 ms (90 to 120), bound by compute",
        "  MFU                         50.0% (40.0% to 55.0%)",
        "  all-gather  fsdp   ICI      24  500 MB  10.000     50%",
        "  samples a second            5,120 (4,267 to 5,689)",
        "  cost                        1,920 (1,728 to 2,304)",
        "  measured                    9 steps/s in runs/a: the estimated step takes 10.0% less",
        "0 errors, 0 warnings",
        "- made by hand",
        "- no input stalls",
    ):
        assert line in shown.splitlines(), line
    assert shown.count("made by hand\n") == 1
    assert max(map(len, text(plan, width=72).splitlines())) <= 72


def test_a_plan_that_does_not_fit_says_what_would(lacking):
    shown = text(lacking, width=200)
    assert lacking.exit_code == 2
    assert "small on made:by-hand: does not fit: " not in shown  # its name is 'experiment'
    assert shown.startswith("experiment on made:by-hand: does not fit: 210 MiB of 100 MiB a device")
    remedy = "--config.remat=offload"
    assert f"  fits with the least computed again: {remedy}" in shown.splitlines()
    error = next(line for line in shown.splitlines() if line.startswith("error"))
    assert f"with {remedy} it fits" in error
    # Known of the recipe without a program: its state.
    assert "  optimizer                       20 MiB   10%" in shown.splitlines()
    assert "  all else                       180 MiB   86%" in shown.splitlines()
    assert f"Memory of a device, with {remedy}" in shown.splitlines()
    assert f"A step (estimates, with {remedy})" in shown.splitlines()


def test_where_nothing_fits_there_is_no_estimate():
    config = config_of(mesh=(16, 1, 1))
    trials = trials_of(Compiler(10**6 * MIB), config)
    asked = trials.compile(Setting.of(config, 16))
    plan = Plan(
        config=config,
        topology=TOPOLOGY,
        asked=asked,
        state=states((16, 1, 1)),
        shown=None,
        search=what_fits(config, TOPOLOGY, trials),
    )
    shown = text(plan, width=100)
    assert plan.exit_code == 2
    assert "nothing that was tried fits: use more devices, a smaller batch" in shown
    assert "A step" not in shown
    assert to_json(plan)["shown"] is None
    Nesting(render_plan_page(plan))


def test_a_warning_is_told_and_an_error_decides_the_exit_code():
    warned = fitting(findings=(Finding("padded-text", "warning", "much padding"),))
    assert "warning padded-text              much padding" in text(warned, width=100).splitlines()
    assert warned.exit_code == 0
    assert fitting(findings=(Finding("x", "error", "y"),)).exit_code == 2


def test_json_has_the_keys_that_the_docs_name(lacking, swept):
    plan = dataclasses.replace(lacking, sweep=swept)
    content = json.loads(json.dumps(to_json(plan), allow_nan=False))
    assert list(content) == [
        "name",
        "fits",
        "topology",
        "asked",
        "state_bytes",
        "memory",
        "shown",
        "findings",
        "search",
        "sweep",
        "config",
        "environment",
    ]
    assert content["asked"] == {
        "mesh": [16, 1, 1],
        "microbatches": 1,
        "remat": "none",
        "verdict": "too large",
        "needed_bytes": 210 * MIB,
        "reason": f"the step needs {210 * MIB} bytes",
    }
    assert content["shown"]["overrides"] == ["--config.remat=offload"]
    assert content["shown"]["estimate"]["step_seconds"] == pytest.approx([0.108, 0.12, 0.144])
    assert content["shown"]["estimate"]["traffic"][0]["axes"] == ["fsdp"]
    assert content["findings"][0]["code"] == "does-not-fit"
    assert content["config"]["global_batch_size"] == 512
    assert {"jax", "jaxlib"} <= content["environment"]["packages"].keys()
    assert len(content["sweep"]["points"]) == len(swept.points)


def test_the_page_has_what_the_text_has_and_loads_nothing(lacking, swept, tmp_path):
    plan = dataclasses.replace(lacking, sweep=swept)
    page = render_plan_page(plan)
    nesting = Nesting(page)
    for section in sections(plan):
        assert section.heading in nesting.text
        for label, figure in section.rows:
            assert label in nesting.text
            assert figure in nesting.text
    assert "script" not in nesting.tags
    assert "src=" not in page
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    num_fitting = sum(point.attempt.fits for point in swept.points)
    assert nesting.tags.count("circle") == num_fitting > 10
    write_plan_page(tmp_path / "plan.html", plan)
    assert (tmp_path / "plan.html").read_text() == page


def test_names_of_strangers_stay_text():
    plan = fitting(name=NASTY, findings=(Finding("x", "warning", NASTY),))
    nesting = Nesting(render_plan_page(plan))
    assert nesting.text.count(NASTY) >= 3  # the title, the heading, the finding
    assert not {"script", "img", "b"} & set(nesting.tags)


def test_a_device_without_a_limit_draws_no_line(swept):
    free = dataclasses.replace(
        fitting(), topology=topology_of(memory=None), sweep=dataclasses.replace(swept, points=())
    )
    shown = text(free, width=100)
    assert "compiles: 50 MiB a device" in shown
    assert "No point fits." in Nesting(render_plan_page(free)).text
