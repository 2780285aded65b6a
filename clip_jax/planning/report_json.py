"""A plan as JSON, for other programs: keys are those of docs/planning.md."""

import dataclasses
import importlib.metadata
import platform
from typing import Any

import clip_jax
from clip_jax.config import to_dict
from clip_jax.planning.estimate import Estimate
from clip_jax.planning.plan import Judged, Plan
from clip_jax.planning.plan_setting import Attempt
from clip_jax.planning.sweep import Point

# Compilers among them: their versions decide what is compiled.
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "libtpu",
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
    "jax-cuda12-plugin",
    "jax-cuda12-pjrt",
)


def to_json(plan: Plan) -> dict[str, Any]:
    """Bytes are of one device, seconds of one step; a range is (low, expected, high)."""
    topology, search, sweep = plan.topology, plan.search, plan.sweep
    shown = plan.shown
    return {
        "name": plan.config.name,
        "fits": plan.fits,
        "topology": {
            "name": topology.name,
            "platform": topology.platform,
            "chip": None if topology.chip is None else topology.chip.name,
            "num_devices": topology.num_devices,
            "num_chips": topology.num_chips,
            "num_hosts": topology.num_hosts,
            "num_slices": topology.num_slices,
            "memory_bytes": topology.memory_bytes,
            "usable_bytes": topology.usable_bytes,
        },
        "asked": _attempt(plan.asked),
        "state_bytes": plan.state._asdict(),
        "memory": None if plan.asked.step is None else _plain(plan.asked.step.memory),
        "shown": None if shown is None else _judged(shown),
        "findings": [finding._asdict() for finding in plan.findings],
        "search": None
        if search is None
        else {
            "attempts": [_attempt(attempt) for attempt in search.attempts],
            "num_compiled": search.num_compiled,
            "limit": search.limit,
        },
        "sweep": None
        if sweep is None
        else {
            "axes": list(sweep.axes),
            "points": [_point(point) for point in sweep.points],
            "num_compiled": sweep.num_compiled,
            "limit": sweep.limit,
        },
        "config": to_dict(plan.config),
        "environment": {
            "clip_jax": clip_jax.__version__,
            "python": platform.python_version(),
            "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        },
    }


def _judged(shown: Judged) -> dict[str, Any]:
    step = shown.step
    return {
        **_setting(shown),
        "overrides": list(shown.overrides),
        "memory": _plain(step.memory),
        "num_devices": step.num_devices,
        "global_batch_size": step.config.global_batch_size,
        "analytic_flops_per_sample": step.analytic_flops,
        "least_flops_per_sample": step.least_flops,
        "dtype": step.dtype,
        "attention": step.attention,
        "compile_seconds": step.compile_seconds,
        "cached": step.cached,
        "estimate": _estimate(shown.estimate),
        "assumptions": [*step.assumptions, *shown.estimate.assumptions],
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    figures = _plain(estimate)
    del figures["assumptions"]  # with those of the step
    return figures


def _attempt(attempt: Attempt) -> dict[str, Any]:
    return {
        **_setting(attempt),
        "verdict": attempt.verdict,
        "needed_bytes": attempt.needed_bytes,
        "reason": attempt.reason,
    }


def _point(point: Point) -> dict[str, Any]:
    seconds = point.step_seconds
    return {
        **_attempt(point.attempt),
        "step_seconds": None if seconds is None else list(seconds),
        "samples_per_second": point.samples_per_second,
        "recomputed": point.recomputed,
        "on_frontier": point.on_frontier,
    }


def _setting(holder: Attempt | Judged) -> dict[str, Any]:
    setting = holder.setting
    return {
        "mesh": list(setting.mesh),
        "microbatches": setting.microbatches,
        "remat": setting.remat,
    }


def _plain(value: Any) -> Any:
    """Dataclasses and named tuples as dicts and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
