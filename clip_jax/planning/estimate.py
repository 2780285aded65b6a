"""How long a compiled step takes, by a roofline: an estimate with its assumptions named.

Each instruction takes the longer of its products at the chip's rate for their dtype and its bytes
at the memory's bandwidth (Williams et al. 2009); collectives take their bytes at the bandwidth of
the links they use. Three times are given:

- low: all at the data sheet's figures, all communication behind computation: a bound;
- expected: the shares of those figures that `estimate_speeds` names; communication hides only
  behind work that the program's order puts between its start and its done;
- high: lower shares, and nothing hides.
"""

import dataclasses
import math
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from clip_jax.models import Execution
from clip_jax.parallel import make_mesh
from clip_jax.planning.attention import unfused_arrays
from clip_jax.planning.calibration import Calibration, num_cores
from clip_jax.planning.estimate_schedule import Schedule, Timed
from clip_jax.planning.estimate_speeds import (
    CALIBRATED_RANGE,
    EXPECTED,
    GUESSED_RANGE,
    PEAK,
    SLOW,
    SOURCES,
    Shares,
    Speeds,
    calibrated_speeds,
    check_dtypes,
    chip_speeds,
    guessed_speeds,
)
from clip_jax.planning.hlo import COLLECTIVES, Collective
from clip_jax.planning.known_errors import known_error
from clip_jax.planning.links import Network
from clip_jax.planning.measured_run import Measured, compare
from clip_jax.planning.traffic import Reader
from clip_jax.training.throughput import Throughput

if TYPE_CHECKING:
    from clip_jax.planning.compiling import CompiledStep
    from clip_jax.planning.topology import Topology

_HOST_BANDWIDTH = 32e9  # PCIe 4.0 x16 of a device to its host's memory, one direction


class Range(NamedTuple):
    """`low` belongs to the shortest step time, `high` to the longest."""

    low: float
    expected: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind along the same axes, in one step of one device."""

    kind: str  # one of hlo.COLLECTIVES
    axes: tuple[str, ...]
    num_bytes: int  # sent by a device
    times: int
    link: str  # "ICI" | "NVLink" | "PCIe" | "DCN" | "memory"
    seconds: float  # at the link's full bandwidth
    asynchronous: float  # share of them with work to hide behind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one step; FLOPs and bytes are one device's."""

    flops: int  # of the program, recomputation with them
    flops_by_dtype: dict[str, int]  # of the operands, as the program spells it
    compute_seconds: float  # FLOPs at the peak
    memory_bytes: int  # read from and written to memory
    memory_seconds: float  # at the full bandwidth
    chip_seconds: float  # instruction by instruction, the longer of both, at the peak
    traffic: tuple[Traffic, ...]
    communication_seconds: float  # of all of it, at full bandwidth
    step_seconds: Range
    bound_by: str  # "compute" | "memory" | "communication": most of the expected time
    mfu: Range | None  # None: the peak is not known; of a calibrated CPU, of what it reaches
    samples_per_second: Range
    num_steps: int
    days: Range
    chip_hours: Range  # of a CPU, of the machine
    cost: Range | None
    assumptions: tuple[str, ...]
    measured: Measured | None


def estimate(
    step: "CompiledStep",
    topology: "Topology",
    *,
    calibration: Calibration | None = None,
    price_per_chip_hour: float | None = None,
    measured: str | None = None,
) -> Estimate:
    """Of a compiled step on a topology.

    price_per_chip_hour: in any currency. measured: a workdir of a run of the same config. Raises
    UserError as `measured_run.compare`.
    """
    config, program = step.config, step.program
    fused = None if topology.platform != "gpu" else unfused_arrays(config, _execution(step))
    reader = Reader(program, fused)
    flops: Counter[str] = Counter()
    num_bytes = host_bytes = 0
    for work, times in reader.work():
        flops.update({dtype: count * times for dtype, count in work.flops.items()})
        num_bytes += times * work.num_bytes
        host_bytes += times * work.host_bytes
    check_dtypes(flops)
    timed = _Times(step, topology, calibration, reader, host_bytes)
    peak = timed.peak
    seconds = timed.seconds
    rates = Range(*(config.global_batch_size / each for each in seconds))
    days = Range(*(config.num_steps * each / 86400 for each in seconds))
    # On CPUs a "chip" is the machine: its simulated devices share it.
    num_chips = 1 if topology.chip is None else topology.num_chips
    hours = Range(*(24 * num_chips * each for each in days))
    price = price_per_chip_hour
    throughput = _throughput(step, topology, calibration, num_chips)
    shares = [throughput.figures(1 / each) for each in seconds]
    key = "mfu" if topology.chip is not None else "mfu_measured"
    return Estimate(
        flops=sum(flops.values()),
        flops_by_dtype=dict(flops),
        compute_seconds=sum(count / peak.flops[dtype] for dtype, count in flops.items()),
        memory_bytes=num_bytes,
        memory_seconds=num_bytes / peak.memory,
        chip_seconds=timed.at_peak.chip_seconds,
        traffic=timed.traffic(),
        communication_seconds=sum(each.seconds for each in timed.at_peak.collectives),
        step_seconds=seconds,
        bound_by=timed.bound_by(),
        mfu=Range(*(each[key] for each in shares)) if key in shares[0] else None,
        samples_per_second=rates,
        num_steps=config.num_steps,
        days=days,
        chip_hours=hours,
        cost=None if price is None else Range(*(price * each for each in hours)),
        assumptions=timed.assumptions(fused=fused is not None, host_bytes=host_bytes),
        measured=None
        if measured is None
        else compare(
            measured,
            config,
            topology,
            expected_seconds=seconds.expected,
            flops_per_sample=step.analytic_flops,
        ),
    )


class _Times:
    """One program timed at three speeds."""

    def __init__(
        self,
        step: "CompiledStep",
        topology: "Topology",
        calibration: Calibration | None,
        reader: Reader,
        host_bytes: int,
    ) -> None:
        self._step, self._topology, self._calibration = step, topology, calibration
        self._reader, self._host_seconds = reader, host_bytes / _HOST_BANDWIDTH
        platform, chip = topology.platform, topology.chip
        self.peak = self._speeds(PEAK)
        mesh = make_mesh(step.config, topology.devices)
        self._network = Network(
            devices=list(mesh.devices.flat),
            chip=chip,
            copy_bandwidth=self.peak.memory if chip is None else math.inf,
        )
        self.at_peak = self._schedule(PEAK)
        if chip is None:
            self._expected = self.at_peak
            self.seconds = self._of_cpu()
            return
        self._expected = self._schedule(EXPECTED[platform])
        slow = self._schedule(SLOW[platform])
        peak_sent = sum(each.seconds for each in self.at_peak.collectives)
        low = max(self.at_peak.chip_seconds, peak_sent, self._host_seconds)
        expected = max(self._expected.chip_seconds, self._host_seconds) + self._exposed
        high = (
            slow.chip_seconds + self._host_seconds + sum(each.seconds for each in slow.collectives)
        )
        self.seconds = Range(low, max(low, expected), max(low, expected, high))

    @property
    def _exposed(self) -> float:
        return sum(each.seconds - each.hidden_seconds for each in self._expected.collectives)

    def _of_cpu(self) -> Range:
        """Nothing hides: the devices compute on the cores that would copy."""
        within = GUESSED_RANGE if self._calibration is None else CALIBRATED_RANGE
        expected = self.at_peak.chip_seconds + sum(t.seconds for t in self.at_peak.collectives)
        return Range(expected / within, expected, expected * within)

    def _speeds(self, shares: Shares) -> Speeds:
        topology = self._topology
        calibration, num_devices = self._calibration, topology.num_devices
        if topology.chip is None:
            if calibration is None:
                return guessed_speeds(num_cores=num_cores(), sharing=num_devices)
            return calibrated_speeds(calibration, sharing=num_devices)
        if calibration is not None and shares is EXPECTED[topology.platform]:
            return calibrated_speeds(calibration, sharing=1)
        return chip_speeds(topology.chip, topology.platform, shares)

    def _schedule(self, shares: Shares) -> Schedule:
        def seconds_of(collective: Collective) -> float:
            route = self._network.route(collective)
            latency = shares.link_seconds[route.link] * max(route.hops, 1) if route.seconds else 0
            return route.seconds / shares.links + latency

        return Schedule(self._reader, self._speeds(shares), seconds_of)

    def traffic(self) -> tuple[Traffic, ...]:
        """Largest first; what nothing is sent by is left out."""
        found: dict[tuple[str, tuple[str, ...], str], list[Timed]] = {}
        for each in self.at_peak.collectives:
            collective = each.collective
            if not collective.sent_bytes:
                continue
            link = self._network.route(collective).link
            key = collective.kind, collective.axes(self._step.mesh), link
            found.setdefault(key, []).append(each)
        hidden = {each.collective.name: each for each in self._expected.collectives}
        rows = []
        for (kind, axes, link), members in found.items():
            expected = [hidden[each.collective.name] for each in members]
            behind = sum(each.hidden_seconds for each in expected)
            rows.append(
                Traffic(
                    kind=kind,
                    axes=axes,
                    num_bytes=sum(each.collective.sent_bytes for each in members),
                    times=sum(each.collective.times for each in members),
                    link=link,
                    seconds=sum(each.seconds for each in members),
                    asynchronous=behind / (sum(each.seconds for each in expected) or 1.0),
                )
            )
        return tuple(sorted(rows, key=lambda row: -row.num_bytes))

    def bound_by(self) -> str:
        """What most of the expected time goes to."""
        spent = {"compute": 0.0, "memory": 0.0, "communication": self._exposed}
        platform = self._topology.platform
        speeds = self._speeds(PEAK if platform == "cpu" else EXPECTED[platform])
        for work, times in self._reader.work():
            if work.opcode.removesuffix("-start") in COLLECTIVES:
                continue
            computing = speeds.computing(work) > speeds.moving(work)
            spent["compute" if computing else "memory"] += times * speeds.seconds(work)
        return max(spent, key=lambda name: spent[name])

    def assumptions(self, *, fused: bool, host_bytes: int) -> tuple[str, ...]:
        """A line each."""
        platform, calibration = self._topology.platform, self._calibration
        lines = ["each instruction takes the longer of its products and its memory traffic"]
        if platform == "cpu":
            lines += [
                "simulated devices share the cores and the memory of this machine",
                f"measured on this machine: {calibration.describe()}"
                if calibration is not None
                else "not calibrated: 40 GFLOP/s a core and 10 GB/s are guesses, a factor of "
                f"{GUESSED_RANGE:g} either way; --calibrate measures this machine",
            ]
            if calibration is not None:
                lines.append(known_error(platform))
            return tuple(lines)
        if calibration is not None:
            lines.append(f"expected: as measured on one device: {calibration.describe()}")
        lines += [
            SOURCES[platform],
            "at best everything runs at the data sheet's figures and all communication hides "
            "behind computation; expected, what is asynchronous and has work between its start "
            "and its end; at worst nothing",
        ]
        if any(each.collective.sent_bytes for each in self.at_peak.collectives):
            lines.append(
                "collectives along a dim of a TPU's torus use both of its links where it is a "
                "ring, else one"
                if platform == "tpu"
                else "collectives in a node use all NVLinks of a GPU; between nodes each GPU has "
                "its own adapter"
            )
        if fused:
            lines.append(
                "compiled with XLA's attention: arrays of scores and copies of q, k and v are left "
                "out of memory and traffic, as cuDNN makes none; its backward pass computes the "
                "scores once more, which is not in the FLOPs; kernels are not autotuned"
            )
        if host_bytes:
            lines.append(
                "activations that lie on the host go there and back at 32 GB/s, while others "
                "compute"
            )
        lines += ["input, checkpoints and evaluation are left out", known_error(platform)]
        return tuple(lines)


def _execution(step: "CompiledStep") -> Execution:
    """That of the run, as far as the arrays of scores go."""
    return Execution(attention="cudnn" if step.attention == "cudnn" else "xla")


def _throughput(
    step: "CompiledStep",
    topology: "Topology",
    calibration: Calibration | None,
    num_chips: int,
) -> Throughput:
    config, chip = step.config, topology.chip
    peak = config.logging.peak_tflops
    if peak is None and chip is not None:
        peak = chip.peak_tflops[config.precision]
    measured = None
    if calibration is not None:
        measured = calibration.matmul_flops[config.precision] / 1e12
    return Throughput(
        global_batch_size=config.global_batch_size,
        flops_per_sample=step.analytic_flops,
        num_chips=num_chips,
        peak_tflops=peak,
        measured_tflops=measured,
    )
