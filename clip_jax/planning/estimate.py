"""How long a compiled step takes, by a roofline: an estimate with its assumptions named.

Each instruction takes the longer of its products at the chip's rate for their dtype and its bytes
at the memory's bandwidth (Williams et al. 2009); collectives take their bytes at the bandwidth of
the links they use. Three times are given:

- low: all at the data sheet's figures, and everything at once: products, memory, each kind of link
  and the host's take the longest of them, a bound;
- expected: the shares of those figures that `estimate_speeds` names; collectives and copies hide
  only behind work that the program's order puts between their start and their done;
- high: lower shares, and nothing hides.
"""

import dataclasses
import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

from clip_jax.models import Execution
from clip_jax.parallel import make_mesh
from clip_jax.planning.attention import recomputed_scores, unfused_arrays
from clip_jax.planning.calibration import Calibration, num_cores
from clip_jax.planning.estimate_assumptions import assumptions
from clip_jax.planning.estimate_schedule import Schedule, Timed
from clip_jax.planning.estimate_speeds import (
    CALIBRATED_RANGE,
    EXPECTED,
    GUESSED_RANGE,
    HOST_BANDWIDTH,
    PEAK,
    SLOW,
    Shares,
    Speeds,
    calibrated_speeds,
    check_dtypes,
    chip_speeds,
    guessed_speeds,
)
from clip_jax.planning.hlo import Collective
from clip_jax.planning.links import Network, Stage
from clip_jax.planning.measured_run import Measured, compare
from clip_jax.planning.traffic import Reader
from clip_jax.training.throughput import Throughput

if TYPE_CHECKING:
    from clip_jax.planning.compiling import CompiledStep
    from clip_jax.planning.topology import Topology


class _Totals(NamedTuple):
    """Of one step of one device."""

    flops: Counter[str]  # by dtype
    recomputed_scores: int  # of them, that the program has not
    num_bytes: int
    host_bytes: int


class Range(NamedTuple):
    """`low` belongs to the shortest step time, `high` to the longest."""

    low: float
    expected: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind along the same axes, in one step of one device.

    Those that cross slices or nodes have a part on the links inside and one on the network.
    """

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

    flops: int  # of the program, recomputation with them, and what fused attention adds
    flops_by_dtype: dict[str, int]  # of the operands, as the program spells it
    compute_seconds: float  # FLOPs at the peak
    memory_bytes: int  # read from and written to memory
    memory_seconds: float  # at the full bandwidth
    host_bytes: int  # to and from the host's memory
    host_seconds: float  # at the full bandwidth
    chip_seconds: float  # instruction by instruction, the longer of both, at the peak
    traffic: tuple[Traffic, ...]
    communication_seconds: float  # of all of it, at full bandwidth
    step_seconds: Range
    # Most of the expected time: "compute" | "memory" | "communication" | "host" | "overhead", which
    # is launches of kernels and latencies of collectives.
    bound_by: str
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
    totals = _totals(step, reader, fused=fused is not None)
    flops, host_bytes = totals.flops, totals.host_bytes
    timed = _Times(step, topology, calibration, reader, totals)
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
        compute_seconds=timed.compute_seconds,
        memory_bytes=totals.num_bytes,
        memory_seconds=timed.memory_seconds,
        host_bytes=host_bytes,
        host_seconds=host_bytes / HOST_BANDWIDTH,
        chip_seconds=timed.chip_seconds,
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
        assumptions=assumptions(
            topology.platform,
            calibration,
            sends=any(each.collective.sent_bytes for each in timed.at_peak.collectives),
            fused=fused is not None,
            to_host=host_bytes > 0,
        ),
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
        totals: _Totals,
    ) -> None:
        self._step, self._topology, self._calibration = step, topology, calibration
        self._reader, self._totals = reader, totals
        platform, chip = topology.platform, topology.chip
        peak = self._speeds(PEAK)
        self.compute_seconds = sum(n / peak.flops[dtype] for dtype, n in totals.flops.items())
        self.memory_seconds = totals.num_bytes / peak.memory
        mesh = make_mesh(step.config, topology.devices)
        network = Network(
            devices=list(mesh.devices.flat),
            chip=chip,
            copy_bandwidth=peak.memory if chip is None else math.inf,
        )
        self._routes = {each.name: network.route(each) for each in reader.program.collectives}
        self.at_peak = self._schedule(PEAK)
        self.chip_seconds = self.at_peak.spent.total + self._scores_seconds(PEAK)
        if chip is None:
            self._expected = self.at_peak
            self.seconds = self._of_cpu()
            return
        self._expected = self._schedule(EXPECTED[platform])
        slow = self._schedule(SLOW[platform])
        links = self._seconds_by_link().values()
        low = max(self.compute_seconds, self.memory_seconds, self._host_seconds(PEAK), *links)
        shares = EXPECTED[platform]
        own = self._expected.spent.total + self._scores_seconds(shares)
        expected = max(own, self._host_seconds(shares)) + self._exposed
        shares = SLOW[platform]
        high = slow.serial_seconds + self._scores_seconds(shares) + self._host_seconds(shares)
        high += sum(each.seconds for each in slow.collectives)
        self.seconds = Range(low, max(low, expected), max(low, expected, high))

    def _host_seconds(self, shares: Shares) -> float:
        return self._totals.host_bytes / (HOST_BANDWIDTH * shares.host)

    def _scores_seconds(self, shares: Shares) -> float:
        return self._totals.recomputed_scores / self._speeds(shares).flops["bf16"]

    def _seconds_by_link(self) -> dict[str, float]:
        """Of all communication, at full bandwidth."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for each in self._reader.program.collectives:
            for stage in self._routes[each.name].stages:
                seconds[stage.link] += each.times * stage.seconds
        return seconds

    @property
    def _exposed(self) -> float:
        return sum(each.seconds - each.hidden_seconds for each in self._expected.collectives)

    def _of_cpu(self) -> Range:
        """Nothing hides: the devices compute on the cores that would copy."""
        within = GUESSED_RANGE if self._calibration is None else CALIBRATED_RANGE
        expected = self.at_peak.spent.total + sum(t.seconds for t in self.at_peak.collectives)
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
            stages = self._routes[collective.name].stages
            return sum(_seconds(stage, shares) for stage in stages)

        return Schedule(self._reader, self._speeds(shares), seconds_of)

    def traffic(self) -> tuple[Traffic, ...]:
        """Largest first; what nothing is sent by is left out."""
        shares = self._expected_shares
        hidden = {each.collective.name: each for each in self._expected.collectives}
        found: dict[tuple[str, tuple[str, ...], str], list[tuple[Timed, Stage]]] = {}
        for each in self.at_peak.collectives:
            collective = each.collective
            for stage in self._routes[collective.name].stages:
                key = collective.kind, collective.axes(self._step.mesh), stage.link
                found.setdefault(key, []).append((hidden[collective.name], stage))
        rows = []
        for (kind, axes, link), members in found.items():
            behind = expected = 0.0
            for timed, stage in members:
                seconds = timed.collective.times * _seconds(stage, shares)
                expected += seconds
                behind += seconds * timed.hidden_seconds / (timed.seconds or 1.0)
            runs = [(timed.collective.times, stage) for timed, stage in members]
            rows.append(
                Traffic(
                    kind=kind,
                    axes=axes,
                    num_bytes=round(sum(times * stage.num_bytes for times, stage in runs)),
                    times=sum(times for times, _ in runs),
                    link=link,
                    seconds=sum(times * stage.seconds for times, stage in runs),
                    asynchronous=behind / (expected or 1.0),
                )
            )
        return tuple(sorted(rows, key=lambda row: -row.num_bytes))

    @property
    def _expected_shares(self) -> Shares:
        platform = self._topology.platform
        return PEAK if platform == "cpu" else EXPECTED[platform]

    def bound_by(self) -> str:
        """What most of the expected time goes to."""
        shares, own = self._expected_shares, self._expected.spent
        waiting = 0.0  # for latencies, as far as nothing hides them
        for each in self._expected.collectives:
            stages = self._routes[each.collective.name].stages
            share = 1 - each.hidden_seconds / (each.seconds or 1.0)
            waiting += share * each.collective.times * sum(_latency(s, shares) for s in stages)
        computing = own.computing + self._scores_seconds(shares)
        spent = {
            "compute": computing,
            "memory": own.moving,
            "communication": self._exposed - waiting,
            "overhead": own.launching + waiting,
        }
        host_seconds = self._host_seconds(shares)
        if host_seconds > computing + own.moving + own.launching:  # all of which it hides
            spent |= {"compute": 0.0, "memory": 0.0, "overhead": waiting, "host": host_seconds}
        return max(spent, key=lambda name: spent[name])


def _latency(stage: Stage, shares: Shares) -> float:
    return shares.link_seconds[stage.link] * max(stage.hops, 1)


def _seconds(stage: Stage, shares: Shares) -> float:
    return stage.seconds / shares.links + _latency(stage, shares)


def _totals(step: "CompiledStep", reader: Reader, *, fused: bool) -> _Totals:
    """Raises UserError for products whose rate is not known."""
    flops: Counter[str] = Counter()
    num_bytes = host_bytes = 0
    for work, times in reader.work():
        flops.update({dtype: count * times for dtype, count in work.flops.items()})
        num_bytes += times * work.num_bytes
        host_bytes += times * work.host_bytes
    check_dtypes(flops)
    scores = 0
    if fused:
        rows = step.config.global_batch_size / step.num_devices
        scores = round(rows * recomputed_scores(step.config, _execution(step)))
        flops["bf16"] += scores
    return _Totals(flops, scores, num_bytes, host_bytes)


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
