"""A grid of settings, compiled and estimated: which fit, how fast they are, and the frontier."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from clip_jax.config import ExperimentConfig, UserError
from clip_jax.planning.compiling import CompiledStep
from clip_jax.planning.estimate import Estimate, Range
from clip_jax.planning.plan_setting import REMATS, Attempt, Setting, is_valid
from clip_jax.planning.plan_trials import Trials
from clip_jax.planning.topology import Topology

LIMIT = 48  # compilations
_LARGEST_TENSOR = 8  # beyond it activations sent outweigh all else (docs/parallelism.md)
_MOST_MICROBATCHES = 16
_FEWEST_ROWS = 8  # of a microbatch on a device: fewer leave a TPU's registers (8 x 128) empty


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One setting of the grid."""

    attempt: Attempt  # without its program
    step_seconds: Range | None = None  # None where it does not fit, as for all below
    samples_per_second: float | None = None  # expected
    recomputed: float | None = None  # FLOPs of the program by those needed, minus 1
    on_frontier: bool = False  # no other needs less memory and is as fast


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Points that fit by expected speed, then the others."""

    axes: tuple[str, ...]
    points: tuple[Point, ...]
    num_compiled: int
    limit: int

    @property
    def num_left_out(self) -> int:
        """Because the limit was reached; some may be on the frontier."""
        return sum(point.attempt.verdict == "not tried" for point in self.points)


def parse_axes(text: str) -> tuple[str, ...]:
    """The axes named by `mesh,remat`, in their own order. Raises UserError for others."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in Setting._fields:
            raise UserError(f"--sweep {text}: {name!r} is none of {','.join(Setting._fields)}")
    return tuple(name for name in Setting._fields if name in names)


def grid(config: ExperimentConfig, topology: Topology, axes: Sequence[str]) -> list[Setting]:
    """The settings along `axes`, in the order of `Setting.order`.

    Meshes: every (data, fsdp, tensor) in which heads, batches and slices divide and tensor, at most
    8, lies within a host. Microbatches: 1, 2, 4, ... 16 while a device has 8 rows of each. Always
    with the config's own.
    """
    own = Setting.of(config, topology.num_devices)
    meshes = _meshes(topology) if "mesh" in axes else [own.mesh]
    remats = [r for r in REMATS if r != "offload" or topology.platform != "cpu"]
    settings = {
        Setting(mesh, microbatches, remat)
        for mesh in meshes
        for microbatches in (
            _splits(config, mesh) if "microbatches" in axes else [own.microbatches]
        )
        for remat in (remats if "remat" in axes else [own.remat])
    }
    valid = {setting for setting in settings if is_valid(setting, config, topology)}
    return sorted({own, *valid}, key=Setting.order)


def run_sweep(
    config: ExperimentConfig,
    topology: Topology,
    axes: tuple[str, ...],
    trials: Trials,
    judge: Callable[[CompiledStep], Estimate],
    *,
    seconds: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Sweep:
    """Compiles the grid. A point that fails is one line of the table; the others go on.

    seconds: of a compilation, where one is known, to tell how long all take.
    """
    settings = grid(config, topology, axes)
    progress(_announced(len(settings), trials.limit, seconds))
    points = []
    for setting, tell in _order(settings, limit=trials.limit):
        attempt = trials.attempt(setting)
        tell(attempt.verdict not in ("ruled out", "not tried"))
        points.append(_point(attempt, judge))
    points = _mark_frontier(points)
    points.sort(key=_rank)
    return Sweep(
        axes=axes, points=tuple(points), num_compiled=trials.num_compiled, limit=trials.limit
    )


def _announced(count: int, limit: int, seconds: float | None) -> str:
    compiled = min(count, limit)
    line = f"sweep: {count:,} settings, at most {compiled} compiled"
    if seconds is not None:
        minutes = max(1, round(compiled * seconds / 60))
        line += f": some {minutes} min, at {seconds:.0f} s each"
    if count > limit:
        line += f"; --max_compiles={count} compiles all"
    return line


def _order(
    settings: Sequence[Setting], *, limit: int
) -> Iterator[tuple[Setting, Callable[[bool], None]]]:
    """Each setting, with what is to be told whether it was compiled.

    All in their order where the limit allows. Else next comes the one whose mesh, microbatches and
    remat were compiled least, so that what is compiled is spread over all axes.
    """
    if len(settings) <= limit:
        yield from ((setting, lambda _: None) for setting in settings)
        return
    compiled: collections.Counter[Any] = collections.Counter()
    left = list(settings)
    while left:
        place = min(range(len(left)), key=lambda i: sum(compiled[x] for x in _values(left[i])))
        setting = left.pop(place)

        def tell(was_compiled: bool, setting: Setting = setting) -> None:
            if was_compiled:
                compiled.update(_values(setting))

        yield setting, tell


def _values(setting: Setting) -> Iterator[tuple[str, Any]]:
    return zip(Setting._fields, setting, strict=True)


def _point(attempt: Attempt, judge: Callable[[CompiledStep], Estimate]) -> Point:
    step = attempt.step
    attempt = dataclasses.replace(attempt, step=None)  # a parsed program is tens of megabytes
    if step is None or not attempt.fits:
        return Point(attempt=attempt)
    try:
        estimate = judge(step)
    except Exception as error:  # noqa: BLE001 - the others go on, whatever becomes of one
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Point(attempt=dataclasses.replace(attempt, verdict="failed", reason=text))
    return Point(
        attempt=attempt,
        step_seconds=estimate.step_seconds,
        samples_per_second=estimate.samples_per_second.expected,
        recomputed=recomputed_share(step),
    )


def recomputed_share(step: CompiledStep) -> float:
    """FLOPs of all devices by what training needs, minus 1: the loss is in it."""
    needed = step.least_flops * step.config.global_batch_size
    return step.program.flops * step.num_devices / needed - 1


def _rank(point: Point) -> tuple[float, float]:
    return -(point.samples_per_second or 0.0), float(point.attempt.needed_bytes or math.inf)


def _mark_frontier(points: Sequence[Point]) -> list[Point]:
    def place(point: Point) -> tuple[float, float]:
        assert point.samples_per_second is not None
        assert point.attempt.needed_bytes is not None
        return -point.samples_per_second, point.attempt.needed_bytes

    fitting = [place(point) for point in points if point.samples_per_second is not None]

    def is_best(point: Point) -> bool:
        if point.samples_per_second is None:
            return False
        own = place(point)
        return not any(o != own and o[0] <= own[0] and o[1] <= own[1] for o in fitting)

    return [dataclasses.replace(point, on_frontier=is_best(point)) for point in points]


def _meshes(topology: Topology) -> list[tuple[int, int, int]]:
    devices = topology.num_devices
    in_host = devices // topology.num_hosts
    return [
        (devices // (fsdp * tensor), fsdp, tensor)
        for tensor, fsdp in itertools.product(range(1, in_host + 1), range(1, devices + 1))
        if tensor <= _LARGEST_TENSOR and in_host % tensor == 0 and devices % (fsdp * tensor) == 0
    ]


def _splits(config: ExperimentConfig, mesh: tuple[int, int, int]) -> list[int]:
    rows = config.global_batch_size // math.prod(mesh[:2])
    sizes = [2**i for i in range(_MOST_MICROBATCHES.bit_length())]
    return [k for k in sizes if rows % k == 0 and (k == 1 or rows // k >= _FEWEST_ROWS)]
