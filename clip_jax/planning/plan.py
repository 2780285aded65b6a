"""`clip-jax plan`: a run's step compiled for a topology, judged, and what would do better."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from clip_jax.config import ExperimentConfig, UserError
from clip_jax.planning.calibration import Calibration
from clip_jax.planning.compiling import CompiledStep, compile_step
from clip_jax.planning.estimate import Estimate, estimate
from clip_jax.planning.findings import Finding, does_not_fit, find
from clip_jax.planning.plan_setting import Attempt, Setting, StateBytes
from clip_jax.planning.plan_state import state_bytes
from clip_jax.planning.plan_trials import Compile, Trials
from clip_jax.planning.search import LIMIT as SEARCH_LIMIT
from clip_jax.planning.search import Search, what_fits
from clip_jax.planning.sweep import LIMIT as SWEEP_LIMIT
from clip_jax.planning.sweep import Sweep, run_sweep
from clip_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """A step with what it costs and what stands out."""

    setting: Setting
    overrides: tuple[str, ...]  # that the recipe needs for it; () for the recipe as it is
    step: CompiledStep
    estimate: Estimate
    findings: tuple[Finding, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All that the command prints."""

    config: ExperimentConfig
    topology: Topology
    asked: Attempt  # the recipe as it is
    state: StateBytes  # of it, on a device
    shown: Judged | None  # the recipe where it fits, else what does; None where nothing does
    search: Search | None = None  # None: the recipe fits, or nothing was searched
    sweep: Sweep | None = None
    not_compared: str | None = None  # a workdir: its run is of a recipe that does not fit

    @property
    def fits(self) -> bool:
        return self.asked.fits

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Of what is shown, after the one that it is not the recipe."""
        shown = () if self.shown is None else self.shown.findings
        return shown if self.fits else (_does_not_fit(self), *shown)

    @property
    def exit_code(self) -> int:
        return 2 if any(finding.level == "error" for finding in self.findings) else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a plan is asked for beside the step itself."""

    calibration: Calibration | None = None
    price_per_chip_hour: float | None = None
    measured: str | None = None  # the workdir of a run to compare with
    searches: bool = True  # where the recipe does not fit
    sweep: tuple[str, ...] = ()  # axes
    max_compiles: int | None = None  # of the search, and of the sweep; None: their own limits


def make_plan(
    config: ExperimentConfig,
    topology: Topology,
    wishes: Wishes,
    *,
    cache: Path | None,
    progress: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Compiles, judges, and searches where the recipe does not fit.

    cache: folder of earlier compilations. Raises UserError in one line for what the compiler
    refuses for another reason than memory.
    """

    def compile(config: ExperimentConfig) -> CompiledStep:
        return compile_step(config, topology, cache=cache, must_fit=False)

    return plan_with(compile, config, topology, wishes, progress=progress)


def plan_with(
    compile: Compile,
    config: ExperimentConfig,
    topology: Topology,
    wishes: Wishes,
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> Plan:
    """As `make_plan`, with what compiles a config."""
    _check_slices(config, topology)
    states = state_bytes(config)
    trials = Trials(
        config,
        memory_bytes=topology.usable_bytes,
        compile=compile,
        state_bytes=states,
        limit=wishes.max_compiles or SEARCH_LIMIT,
        progress=progress,
    )
    own = Setting.of(config, topology.num_devices)
    progress(f"compiling {config.name} for {topology.name}: {own}")
    asked = trials.compile(own)
    if asked.verdict == "failed":
        raise UserError(asked.reason)

    def judge(step: CompiledStep) -> Estimate:
        return estimate(
            step,
            topology,
            calibration=wishes.calibration,
            price_per_chip_hour=wishes.price_per_chip_hour,
        )

    search = None
    if not asked.fits and wishes.searches:
        search = what_fits(config, topology, trials)
    found: Attempt | None = asked
    if not asked.fits:
        found = None if search is None else search.chosen
    shown = None
    if found is not None and found.step is not None:
        # A measured run is of the recipe itself: nothing else is compared with it.
        shown = _judged(found, config, topology, wishes, measured=asked.fits)
    sweep = None
    if wishes.sweep:
        sweep_trials = trials.with_limit(wishes.max_compiles or SWEEP_LIMIT)
        sweep = run_sweep(
            config,
            topology,
            wishes.sweep,
            sweep_trials,
            judge,
            seconds=None if found is None or found.step is None else found.step.compile_seconds,
            progress=progress,
        )
    return Plan(
        config=config,
        topology=topology,
        asked=asked,
        state=states(own.mesh),
        shown=shown,
        search=search,
        sweep=sweep,
        not_compared=None if asked.fits else wishes.measured,
    )


def _check_slices(config: ExperimentConfig, topology: Topology) -> None:
    wanted = config.num_slices
    if wanted is not None and wanted != topology.num_slices:
        raise UserError(
            f"config.num_slices is {wanted}, and topology {topology.name} has "
            f"{topology.num_slices}; *N after its name is N slices or nodes, and "
            "--config.num_slices=None takes as many as it has"
        )


def _judged(
    attempt: Attempt,
    config: ExperimentConfig,
    topology: Topology,
    wishes: Wishes,
    *,
    measured: bool,
) -> Judged:
    assert attempt.step is not None
    result = estimate(
        attempt.step,
        topology,
        calibration=wishes.calibration,
        price_per_chip_hour=wishes.price_per_chip_hour,
        measured=wishes.measured if measured else None,
    )
    return Judged(
        setting=attempt.setting,
        overrides=attempt.setting.overrides(config, topology.num_devices),
        step=attempt.step,
        estimate=result,
        findings=tuple(find(attempt.step, topology, result)),
    )


def _does_not_fit(plan: Plan) -> Finding:
    assert plan.asked.needed_bytes is not None
    overrides = "" if plan.shown is None else " ".join(plan.shown.overrides)
    text = does_not_fit(plan.asked.needed_bytes, plan.topology, overrides=overrides)
    if plan.not_compared is not None:
        text += f"; the run in {plan.not_compared} is of the recipe as it is, and not compared"
    return Finding("does-not-fit", "error", text)
