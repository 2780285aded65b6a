"""Devices that are compiled for and need not be there: TPU slices, GPU nodes, CPUs."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from typing import TYPE_CHECKING, Any, Literal

from clip_jax.config.errors import UserError
from clip_jax.planning.compiler_errors import one_line, sizes_too_large
from clip_jax.planning.gpus import GPUS

if TYPE_CHECKING:
    from clip_jax.parallel.chips import Chip

Platform = Literal["tpu", "gpu", "cpu"]

THERE_IS = (
    "there are v4:2x2x2, v5p:4x4x4 and 7x:2x2x2, v5e:4x4 and v6e:16x16 (TPU chips along each side "
    f"of a slice), {', '.join(f'{name}x8' for name in GPUS)} (GPUs of a node) and cpu:8; *N after "
    "one is N slices or nodes: v5e:16x16*2"
)
_TPU = re.compile(r"(?:tpu-?)?(v4|v5e|v5p|v6e|v?7x):(\d+(?:x\d+)+)(?:\*(\d+))?")
_CHIPS = re.compile(r"(v5litepod|v5e|v6e)-(\d+)")  # Google's names, by chips
_GPU = re.compile(rf"({'|'.join(GPUS)})(?:x(\d+))?(?:\*(\d+))?")
_CPU = re.compile(r"cpu:(\d+)")
_MOST_DEVICES = 2**14  # 9,216 chips are the largest slice, of 7x

# What JAX takes of a GPU's memory when it starts, and its variables for another share: jaxlib
# 0.10.2 calls the second one deprecated, and refuses both together.
PREALLOCATED = 0.75
FRACTION = "XLA_CLIENT_MEM_FRACTION"
_OLD_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"

_LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
# Where libtpu is loaded for its compiler alone.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nor a TPU to keep another process away from
    # Else it writes that it cannot find out what machine this is.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """A topology as it is spelled, before anything is loaded for it."""

    name: str  # "v5e:4x4*2"
    platform: Platform
    kind: str  # "v5e", "h100", "cpu"
    shape: tuple[int, ...]  # chips of a slice along each dim of its torus; of a node: (8,)
    num_slices: int  # slices of a TPU, nodes of GPUs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices to make a mesh of, and what is known of them."""

    name: str
    platform: Platform
    devices: tuple[Any, ...]  # jax.Device, or what stands for one that is not there
    chip: "Chip | None"  # its data sheet; None: a CPU
    num_hosts: int
    num_slices: int
    memory_bytes: int | None  # of one device; None: a CPU's, which all processes share
    compiler_bytes: int | None = None  # of it, what a TPU's compiler lets a program take

    @property
    def num_devices(self) -> int:
        return len(self.devices)

    @property
    def num_chips(self) -> int:
        return self.num_devices // (1 if self.chip is None else self.chip.num_devices)

    @property
    def usable_bytes(self) -> int | None:
        """What a program may take: on GPUs the share that JAX takes when it starts."""
        if self.compiler_bytes is not None:
            return self.compiler_bytes
        if self.memory_bytes is None or self.platform != "gpu":
            return self.memory_bytes
        return int(self.memory_bytes * preallocated())


def preallocated() -> float:
    """The share of a GPU's memory that JAX takes: $XLA_CLIENT_MEM_FRACTION or 0.75.

    Raises UserError for what JAX refuses, or takes for no share.
    """
    given = {name: text for name in (FRACTION, _OLD_FRACTION) if (text := os.environ.get(name, ""))}
    if len(given) > 1:
        raise UserError(
            f"{_OLD_FRACTION} and {FRACTION} are both set; unset the first, an old name"
        )
    for name, text in given.items():
        with contextlib.suppress(ValueError):
            if 0 < (share := float(text)) <= 1:
                return share
        raise UserError(f"{name}={text} is no share of a GPU's memory; above 0, at most 1")
    return PREALLOCATED


def parse_topology(text: str) -> Wanted:
    """The topology that `text` spells; nothing is loaded. Raises UserError with what there is."""
    spelled = text.strip().lower()
    if match := _TPU.fullmatch(spelled):
        kind = match[1].replace("v7x", "7x")
        return _tpu(text, kind, match[2], int(match[3] or 1))
    if match := _GPU.fullmatch(spelled):
        num_gpus, num_nodes = int(match[2] or 1), int(match[3] or 1)
        name = f"{match[1]}x{num_gpus}" + (f"*{num_nodes}" if num_nodes > 1 else "")
        return _checked(
            Wanted(
                name=name,
                platform="gpu",
                kind=match[1],
                shape=(num_gpus,),
                num_slices=num_nodes,
            )
        )
    if match := _CPU.fullmatch(spelled):
        return _checked(
            Wanted(name=spelled, platform="cpu", kind="cpu", shape=(int(match[1]),), num_slices=1)
        )
    if (match := _CHIPS.fullmatch(spelled)) and 1 < int(match[2]) <= _MOST_DEVICES:
        chips = int(match[2])
        side = next(n for n in range(math.isqrt(chips), 0, -1) if chips % n == 0)
        kind = match[1].replace("litepod", "e")
        raise UserError(f"{text!r} is spelled by its sides here: {kind}:{side}x{chips // side}")
    raise UserError(f"there is no topology {text!r}; {THERE_IS}")


def _tpu(text: str, kind: str, shape: str, num_slices: int) -> Wanted:
    dims = tuple(int(size) for size in shape.split("x"))
    wanted = _GENERATIONS[kind].num_dims
    if len(dims) != wanted:
        example = "x".join("4" * wanted)
        raise UserError(
            f"a slice of {kind} has {wanted} sides, and {text!r} has {len(dims)}; as in "
            f"{kind}:{example}"
        )
    most = _GENERATIONS[kind].most
    if max(dims) > most:
        sides = [min(size, most) for size in dims]
        count = num_slices * math.prod(-(-size // most) for size in dims)
        raise UserError(
            f"a slice of {kind} has at most {most} chips along a side, and {text!r} has "
            f"{max(dims):,}; {kind}:{'x'.join(map(str, sides))}*{count} is {count:,} slices"
        )
    name = f"{kind}:{shape}" + (f"*{num_slices}" if num_slices > 1 else "")
    found = _checked(
        Wanted(name=name, platform="tpu", kind=kind, shape=dims, num_slices=num_slices)
    )
    if set(dims) != {1} and any(side % 2 for side in dims[:2]):
        raise UserError(
            f"there is no topology {text!r}: the first two sides of a slice are even, as hosts "
            f"have 2 x 2 chips, or all are 1: {kind}:{'x'.join('1' * wanted)}"
        )
    return found


def _checked(wanted: Wanted) -> Wanted:
    count = wanted.num_slices
    for size in wanted.shape:
        count *= size
    if not 0 < count <= _MOST_DEVICES:
        raise UserError(
            f"topology {wanted.name!r} has {count:,} chips; at least one, at most {_MOST_DEVICES:,}"
        )
    return wanted


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Generation:
    """How libtpu names a TPU, and how its chips are put together."""

    libtpu: str
    num_dims: int
    # Sides at which an axis is a ring: of 2-D slices a whole pod's 16, of 3-D ones multiples of 4,
    # where all sides are.
    ring: int
    # Chips along a side of the largest slice (Google's Cloud TPU documentation): 16x16 of 2-D ones,
    # 12x12x24 of v4, a v5p's pod of 16x20x28, a 7x's of 16x24x24.
    most: int
    # 'megacore': the two cores of a chip are one device, as they are on TPU VMs.
    chip_config: str = "default"


_GENERATIONS = {
    "v4": _Generation(libtpu="v4", num_dims=3, ring=4, most=24, chip_config="megacore"),
    "v5e": _Generation(libtpu="v5e", num_dims=2, ring=16, most=16),
    "v5p": _Generation(libtpu="v5p", num_dims=3, ring=4, most=28),
    "v6e": _Generation(libtpu="v6e", num_dims=2, ring=16, most=16),
    "7x": _Generation(libtpu="tpu7x", num_dims=3, ring=4, most=24),
}


def prepare(wanted: Wanted) -> None:
    """Sets what must be set before JAX's backends start: those of this machine stay out of it.

    Raises UserError where JAX has started with fewer CPU devices than are asked for.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    if wanted.platform == "tpu":
        for name, value in _LIBTPU.items():
            os.environ.setdefault(name, value)
    if os.environ.get(_LOG_LEVEL, "1") == "1":  # which JAX sets
        os.environ[_LOG_LEVEL] = "2"  # no warnings of programs that do not fit: a plan says it
    import jax

    jax.config.update("jax_platforms", "cpu")
    if wanted.platform != "cpu":
        return
    (count,) = wanted.shape
    if jax.config.values["jax_num_cpu_devices"] >= count:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has started
        if len(jax.devices()) < count:
            raise UserError(
                f"JAX has started with {len(jax.devices())} CPU devices; {wanted.name} needs a "
                "process of its own"
            ) from None


def open_topology(text: str) -> Topology:
    """The devices. Raises UserError, also where the compiler for them is not installed."""
    wanted = parse_topology(text)
    _check_installed(wanted)
    prepare(wanted)
    from jax.errors import JaxRuntimeError

    from clip_jax.parallel.chips import chip_of

    try:
        devices = _devices(wanted)
    except (JaxRuntimeError, RuntimeError) as error:
        raise UserError(
            f"topology {wanted.name}: the compiler refuses it: {one_line(error)}"
        ) from None
    chip = chip_of(devices[0])
    memory = None if chip is None else chip.memory_bytes // chip.num_devices
    allowed = None
    if wanted.platform == "gpu":
        memory = GPUS[wanted.kind].memory
    elif memory is not None:
        allowed = _of_compiler(devices[0], memory)
        memory = max(memory, allowed or 0)  # a v5p has some more than its data sheet says
    return Topology(
        name=wanted.name,
        platform=wanted.platform,
        devices=devices,
        chip=chip,
        num_hosts=len({device.process_index for device in devices}),
        num_slices=wanted.num_slices,
        memory_bytes=memory,
        compiler_bytes=allowed,
    )


def _of_compiler(device: Any, memory_bytes: int) -> int | None:
    """What a TPU's compiler lets a program take: it says so of one that takes too much (30 ms)."""
    import jax
    from jax.errors import JaxRuntimeError

    sharding = jax.sharding.SingleDeviceSharding(device)
    too_large = jax.ShapeDtypeStruct((2 * memory_bytes // 2**22, 2**20), "float32")
    sum_up = jax.jit(lambda x: x.sum(), in_shardings=sharding, out_shardings=sharding)
    try:
        sum_up.lower(too_large).compile()
    except JaxRuntimeError as error:
        sizes = sizes_too_large(str(error))
        return None if sizes is None else sizes[1]
    return None


def _check_installed(wanted: Wanted) -> None:
    if wanted.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"topology {wanted.name} needs the TPU compiler, which needs no TPU: "
            "pip install 'clip-jax-training[plan-tpu]'"
        )
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if wanted.platform == "gpu" and not any(map(importlib.util.find_spec, plugins)):
        raise UserError(
            f"topology {wanted.name} needs the CUDA compiler, which needs no GPU: "
            "pip install 'clip-jax-training[plan-cuda]'"
        )


def _devices(wanted: Wanted) -> tuple[Any, ...]:
    import jax
    from jax.experimental import topologies

    if wanted.platform == "cpu":
        return tuple(jax.devices("cpu")[: wanted.shape[0]])
    if wanted.platform == "gpu":
        # Partitions, hosts of each, GPUs of each.
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology=f"1x{wanted.num_slices}x{wanted.shape[0]}",
            target_config=GPUS[wanted.kind].target_config(),
        )
        return tuple(topology.devices)
    generation = _GENERATIONS[wanted.kind]
    topology = topologies.get_topology_desc(
        f"{generation.libtpu}:{'x'.join(map(str, wanted.shape))}",
        platform="tpu",
        chip_config_name=generation.chip_config,
        chips_per_host_bounds=_chips_of_host(wanted.shape),
        num_slices=wanted.num_slices,
        wrap=_rings(wanted.shape, generation.ring),
    )
    return tuple(topology.devices)


def _chips_of_host(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Google's machines have four chips; those of a single chip and of 2x4 chips have them all."""
    sides = (*shape, 1)[:3]
    x, y, z = sides
    return (x, y, z) if sides in ((1, 1, 1), (2, 4, 1)) else (2, 2, 1)


def _rings(shape: tuple[int, ...], ring: int) -> tuple[bool, bool, bool]:
    if len(shape) == 2:
        return shape[0] == ring, shape[1] == ring, False
    return (all(size % ring == 0 for size in shape),) * 3
