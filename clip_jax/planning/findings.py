"""What stands out in a compiled step: a line each, with the numbers and what to do about it.

Codes are stable: lists of accepted findings beside recipes name them (docs/planning.md).
"""

from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple

from clip_jax.planning.compiling import ArrayInfo, CompiledStep
from clip_jax.planning.doctor_case import size
from clip_jax.planning.estimate import Estimate
from clip_jax.planning.findings_shapes import Shapes, shape_findings
from clip_jax.planning.findings_weights import WeightShapes
from clip_jax.planning.hlo import Collective, operands, product_flops
from clip_jax.planning.topology import FRACTION, Topology

_LARGE_BYTES = 1 << 20  # as `parallel.sharding` warns of
_SMALL_BYTES = 1 << 16  # a gather below it is of statistics and keys
_FLOAT32_SHARE = 0.02  # of the FLOPs
_FULL = 0.95  # of a device's memory: what allocators lose and what else a run holds


class Finding(NamedTuple):
    code: str  # "replicated-parameters"
    level: Literal["error", "warning"]
    text: str


def find(step: CompiledStep, topology: Topology, estimate: Estimate) -> list[Finding]:
    """All findings, errors first."""
    shapes = Shapes(step.config, step.platform, topology.chip, rows=rows_per_device(step))
    found = [
        *_memory(step, topology),
        *_replicated(step),
        *_activations(step),
        *(Finding(code, "warning", text) for code, text in shape_findings(shapes)),
        *_float32_products(step),
        *_communication(step, estimate),
    ]
    return sorted(found, key=lambda finding: finding.level != "error")


def rows_per_device(step: CompiledStep) -> int:
    """Pairs of a batch that a device has."""
    return step.config.global_batch_size // (step.mesh["data"] * step.mesh["fsdp"])


def _memory(step: CompiledStep, topology: Topology) -> Iterator[Finding]:
    has, needed = topology.usable_bytes, step.memory.total
    if has is None:
        return
    if needed > has:
        yield Finding("does-not-fit", "error", does_not_fit(needed, topology))
    elif needed > _FULL * has:
        text = (
            f"the step needs {gib(needed)} of {room(topology)}: what allocators lose may be more; "
            f"keep {1 - _FULL:.0%} free"
        )
        yield Finding("little-room", "warning", text)


def does_not_fit(needed_bytes: int, topology: Topology, *, overrides: str = "") -> str:
    """The line for a step whose figures are known. overrides: with which it fits."""
    text = f"the step needs {gib(needed_bytes)} of a device's memory, which has {room(topology)}"
    if overrides:
        return f"{text}; with {overrides} it fits"
    has, usable = topology.memory_bytes, topology.usable_bytes
    if has is not None and has != usable and needed_bytes < _FULL * has:
        return f"{text}; {FRACTION}={_FULL} lets JAX take more, here as there"
    return f"{text}; raise microbatches or fsdp, or compute more again (remat)"


def room(topology: Topology) -> str:
    """`59.3 GiB (75% of 79.1 GiB)`; what a program may take of a device."""
    has, usable = topology.memory_bytes, topology.usable_bytes
    assert has is not None
    assert usable is not None
    return gib(has) if has == usable else f"{gib(usable)} ({usable / has:.0%} of {gib(has)})"


def _replicated(step: CompiledStep) -> Iterator[Finding]:
    """Large parameters of which each device holds all, though the mesh splits weights."""
    fsdp, tensor = step.mesh["fsdp"], step.mesh["tensor"]
    whole = [
        array
        for array in step.arrays
        if array.path.startswith("params/")
        and array.num_bytes > _LARGE_BYTES
        and array.device_bytes == array.num_bytes
    ]
    if fsdp * tensor == 1 or not whole:
        return
    largest = max(whole, key=lambda array: array.num_bytes)
    axis, parts = ("fsdp", fsdp) if fsdp > 1 else ("tensor", tensor)
    text = (
        f"{_count(len(whole), 'parameter')} over 1 MiB ({size(_bytes(whole))}) lie whole on each "
        f"device though {axis} is {parts}, the largest {largest.path} {largest.shape}; "
    )
    text += (
        f"choose an fsdp that divides one of its dims, or a width that {parts} divides"
        if fsdp > 1
        else "an fsdp axis splits them"
    )
    yield Finding("replicated-parameters", "warning", text)


def _activations(step: CompiledStep) -> Iterator[Finding]:
    """Activations that move between devices outside of the loss, by what no weight looks like."""
    weights = WeightShapes(step.arrays, step.mesh)
    exchanged: list[Collective] = []
    gathered: list[Collective] = []
    for collective in step.program.collectives:
        if collective.sent_bytes == 0 or _in_shard_map(collective):
            continue
        if collective.kind == "all-to-all":
            exchanged.append(collective)
        elif collective.kind in ("all-gather", "collective-permute"):
            unknown = weights.bytes_of_others(collective)
            if unknown > _SMALL_BYTES:
                gathered.append(collective)
    remedy = "a mesh with another tensor or fsdp size may avoid it (docs/parallelism.md)"
    for code, what, found in (
        ("all-to-all", "all-to-all", exchanged),
        ("gathered-activations", "gather or exchange of activations", gathered),
    ):
        if found:
            yield Finding(code, "warning", f"{_moved(step, what, found)}; {remedy}")


def _in_shard_map(collective: Collective) -> bool:
    """What the project's own code sends: the loss, and the look-up of tokens."""
    return "shard_map/" in collective.op_name


def _moved(step: CompiledStep, what: str, found: list[Collective]) -> str:
    largest = max(found, key=lambda collective: collective.sent_bytes)
    axes = "+".join(largest.axes(step.mesh)) or "no axis"
    shapes = " ".join(f"{dtype}{list(dims)}" for dtype, dims in largest.shapes[:2])
    times = sum(collective.times for collective in found)
    sent = sum(collective.sent_bytes for collective in found)
    origin = f" ({largest.op_name[-60:]})" if largest.op_name else ""
    return (
        f"{_count(times, what)} in a step, {size(sent)} sent by a device, the largest over {axes} "
        f"of {shapes}{origin}"
    )


def _float32_products(step: CompiledStep) -> Iterator[Finding]:
    """Products of float32 operands under bfloat16, those of the loss apart."""
    if step.dtype != "bfloat16" or step.platform == "cpu":
        return
    flops: Counter[str] = Counter()
    largest = (0, "")  # of the towers
    for instruction, computation, times in step.program.instructions():
        if count := product_flops(instruction, computation):
            dtype = computation[operands(instruction)[0]].shapes[0][0]
            where = "loss" if "shard_map/" in instruction.op_name else "towers"
            flops[f"{where} {dtype}"] += times * count
            if (where, dtype) == ("towers", "f32"):
                largest = max(largest, (times * count, instruction.op_name))
    total = flops.total()
    if total and flops["towers f32"] > _FLOAT32_SHARE * total:
        text = (
            f"{flops['towers f32'] / total:.1%} of the FLOPs are products of float32 operands "
            f"under precision bfloat16, half as fast or slower; the largest: {largest[1][-80:]}"
        )
        yield Finding("float32-products", "warning", text)
    if total and flops["loss f32"] > _FLOAT32_SHARE * total:
        text = (
            f"{flops['loss f32'] / total:.1%} of the FLOPs are the loss's, exact in float32, which "
            "takes several passes each; --config.loss.product_dtype=bfloat16 takes one"
        )
        yield Finding("float32-loss", "warning", text)


def _communication(step: CompiledStep, estimate: Estimate) -> Iterator[Finding]:
    if estimate.bound_by != "communication":
        return
    largest = max(estimate.traffic, key=lambda traffic: traffic.seconds)
    remedy = {
        "DCN": "keep fsdp inside a slice or node, so that gradients alone cross once",
        "memory": "simulated devices share one memory: real ones differ",
    }.get(largest.link, "more rows a device, a smaller fsdp axis, or fewer microbatches send less")
    text = (
        f"sending takes {1e3 * estimate.communication_seconds:.1f} ms of a step and computing "
        f"{1e3 * estimate.chip_seconds:.1f}: most in {largest.kind} over "
        f"{'+'.join(largest.axes)} on {largest.link}, {size(largest.num_bytes)}; {remedy}"
    )
    yield Finding("communication-bound", "warning", text)


def gib(num_bytes: float) -> str:
    """`15.75 GiB`: memory of devices is sold, and told by compilers, in powers of two."""
    for power, unit in ((0, "B"), (10, "KiB"), (20, "MiB")):
        if num_bytes < 2 ** (power + 10):
            return f"{num_bytes / 2**power:.4g} {unit}"
    return f"{num_bytes / 2**30:.4g} GiB"


def _bytes(arrays: list[ArrayInfo]) -> int:
    return sum(array.num_bytes for array in arrays)


def _count(number: int, what: str) -> str:
    if number == 1:
        return f"1 {what}"
    plural = what.replace("gather", "gathers").replace("exchange of", "exchanges of")
    return f"{number:,} {plural if plural != what else what + 's'}"
