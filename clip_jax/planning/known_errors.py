"""How far plans were off where their steps were run, as benchmarks/plan_accuracy.py found."""

from typing import NamedTuple


class KnownError(NamedTuple):
    """The worst of `num_steps` steps, as shares of what was measured."""

    machine: str
    num_steps: int
    memory: float
    time: float


# By platform; tests compare them with benchmarks/results/plan_accuracy.json.
KNOWN_ERRORS = {
    "cpu": KnownError("2 cores of an AMD EPYC, calibrated", 6, memory=0.04, time=0.16),
}


def known_error(platform: str) -> str:
    """A line for the assumptions of an estimate."""
    known = KNOWN_ERRORS.get(platform)
    if known is None:
        return (
            "no step was measured on hardware of this kind: how far the times are off is not "
            "known; --measured=WORKDIR tells it of a run"
        )
    return (
        f"such plans were at most {known.memory:.0%} off in memory and {known.time:.0%} in step "
        f"time, in {known.num_steps} steps on {known.machine} (docs/planning.md)"
    )
