"""A real run against its estimate: whether it is of the same step on the same hardware, and how far
the estimate is off.

A workdir does not name its hardware. It is told by what the run logged: how many chips share the
samples, and of which peak its MFU is.
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clip_jax.checkpoint import Workdir
from clip_jax.config import ConfigError, ExperimentConfig, check_devices, to_dict
from clip_jax.config.errors import UserError
from clip_jax.planning.assumed import assume

if TYPE_CHECKING:
    from clip_jax.planning.topology import Topology

# What a step's time depends on; numbers of the loss and the optimizer are not among it.
_FIELDS = (
    *("model", "global_batch_size", "precision", "microbatches", "remat", "layers"),
    *("deterministic", "loss", "optimizer", "start.lock", "data.packing", "logging.layer_norms"),
)
_NUMBERS = ("loss", "optimizer")
_SAME_PEAK = 0.02  # relative; chips' differ by tens of percent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A real run of the same config, and how far the estimate is off."""

    workdir: str
    steps_per_second: float  # median of its log, waits for data taken out
    error: float  # expected step time by the measured one, minus 1


def compare(
    workdir: str,
    config: ExperimentConfig,
    topology: "Topology",
    *,
    expected_seconds: float,
    flops_per_sample: int | None = None,
) -> Measured:
    """A run's speed against the estimate of a step of `config` on `topology`.

    workdir: a folder, or a bucket (gs://...). flops_per_sample: analytic; None: the kind of chip is
    not compared. Raises UserError where the run was of another step or on other hardware, or has
    logged no speed.
    """
    run = Workdir(workdir)
    ran = run.load_config()
    _check_step(str(run.path), ran, config, topology)
    logged = _speeds(run)
    _check_hardware(str(run.path), logged[-1], ran, topology, flops_per_sample)
    seconds = statistics.median(
        (1 - line.get("data_wait", 0.0)) / line["steps_per_second"] for line in logged
    )
    return Measured(
        workdir=str(run.path),
        steps_per_second=1 / seconds,
        error=expected_seconds / seconds - 1,
    )


def _check_step(
    workdir: str, ran: ExperimentConfig, config: ExperimentConfig, topology: "Topology"
) -> None:
    count = topology.num_devices
    try:
        meshes = [check_devices(each, count) for each in (ran, config)]
        completed = [assume(each, count)[0] for each in (ran, config)]
    except ConfigError as error:
        raise UserError(
            f"the run in {workdir} was not on {count} devices, as {topology.name} has: {error}"
        ) from None
    differs = None
    if meshes[0] != meshes[1]:
        differs = "mesh", meshes[0], meshes[1]
    for name in _FIELDS:
        theirs, ours = (_of(each, name) for each in completed)
        if differs is None and theirs != ours:
            differs = _first_difference(name, theirs, ours)
    if differs is not None:
        name, theirs, ours = differs
        raise UserError(
            f"the run in {workdir} is of another step: its config.{name} is {theirs}, not {ours}; "
            f"--config={workdir}/config.json plans what it ran"
        )


def _of(config: ExperimentConfig, name: str) -> Any:
    """The field as plain values; of fields that hold rates and the like, without numbers."""
    value: Any = to_dict(config)
    for part in name.split("."):
        value = value[part]
    return _without_numbers(value) if name in _NUMBERS else value


def _without_numbers(value: Any) -> Any:
    """Whether there is one still counts: a moving average takes time, its decay does not."""
    if isinstance(value, dict):
        return {key: _without_numbers(each) for key, each in value.items()}
    return "a number" if isinstance(value, float) else value


def _first_difference(name: str, theirs: Any, ours: Any) -> tuple[str, Any, Any]:
    """Down to the single field."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        key = next(key for key in theirs | ours if theirs.get(key) != ours.get(key))
        return _first_difference(f"{name}.{key}", theirs.get(key), ours.get(key))
    return name, theirs, ours


def _speeds(run: Workdir) -> list[dict[str, Any]]:
    """Lines of its log with a speed; what is no line of a log is passed over, as a run does that
    was stopped while it wrote one.
    """
    text = run.metrics.read_text(errors="replace") if run.metrics.exists() else ""
    lines = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and _is_positive(values.get("steps_per_second")):
            lines.append(values)
    if not lines:
        raise UserError(f"the run in {run.path} has logged no steps_per_second yet")
    return lines[1:] or lines  # the first after a start has warming up in it


def _check_hardware(
    workdir: str,
    line: Mapping[str, Any],
    ran: ExperimentConfig,
    topology: "Topology",
    flops_per_sample: int | None,
) -> None:
    """Raises UserError where the run's log tells of other chips than the topology's."""
    chip = topology.chip
    wanted = 1 if chip is None else topology.num_chips  # of CPUs, processes
    samples, per_chip = (
        line.get(name, 0) for name in ("samples_per_second", "samples_per_second_per_chip")
    )
    if not (_is_positive(samples) and _is_positive(per_chip)):
        return
    num_chips = round(samples / per_chip)
    if num_chips != wanted:
        raise UserError(
            f"the run in {workdir} was on {num_chips} chips, and {topology.name} has {wanted}"
        )
    if ran.logging.peak_tflops is not None:
        return  # its MFU is of that
    mfu = line.get("mfu", 0)
    if (chip is not None) != _is_positive(mfu):
        raise UserError(
            f"the run in {workdir} was not on {topology.name}: it logged "
            f"{'the MFU of a chip' if chip is None else 'no MFU, as runs on CPUs do'}"
        )
    if chip is None or flops_per_sample is None:
        return
    peak = per_chip * flops_per_sample / mfu / 1e12
    expected = chip.peak_tflops[ran.precision]
    if abs(peak / expected - 1) > _SAME_PEAK:
        raise UserError(
            f"the run in {workdir} was not on {topology.name}: its MFU is of chips of {peak:.0f} "
            f"TFLOP/s, and a {chip.name} has {expected:.0f}"
        )


def _is_positive(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
    )
