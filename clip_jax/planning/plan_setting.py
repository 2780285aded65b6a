"""What a plan may change of a run without changing its result: mesh, microbatches, remat."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from clip_jax.config import ConfigError, ExperimentConfig, check_devices
from clip_jax.planning.compiling import CompiledStep
from clip_jax.planning.topology import Topology

Remat = Literal["none", "dots", "full", "offload"]
# Rising in what they compute again; offloading, as much as 'dots', also waits for the host.
REMATS: tuple[Remat, ...] = ("none", "dots", "offload", "full")
# Those that keep at least as much in memory. 'offload' and 'full' are not compared: one keeps
# products for the time it takes to send them, the other computes a layer's at once.
_KEEP_AS_MUCH: dict[Remat, tuple[Remat, ...]] = {
    "none": ("none",),
    "dots": ("none", "dots"),
    "offload": ("none", "dots", "offload"),
    "full": ("none", "dots", "full"),
}
# Shares of the FLOPs that training needs, to order what is not compiled yet: a forward pass is a
# third of them, of which 'dots' repeats attention's products, some 5% (ViT-B/16: 4%), and 'full'
# all but the first and last layers.
_FORWARD, _ATTENTION, _BLOCKS = 1 / 3, 0.05, 0.99
_MANY = 1e6  # weights: what sends activations comes after what does not


class Setting(NamedTuple):
    """One way to run the same training."""

    mesh: tuple[int, int, int]  # data, fsdp, tensor
    microbatches: int
    remat: Remat

    @classmethod
    def of(cls, config: ExperimentConfig, num_devices: int) -> "Setting":
        """That of a config. Raises ConfigError where it does not go with the devices."""
        return cls(check_devices(config, num_devices), config.microbatches, config.remat)

    def apply(self, config: ExperimentConfig) -> ExperimentConfig:
        return dataclasses.replace(config, **self._asdict())

    def overrides(self, config: ExperimentConfig, num_devices: int) -> tuple[str, ...]:
        """What to add to the command line of `config` for it; () where it is as it is."""
        before = Setting.of(config, num_devices)
        changed = []
        if self.mesh != before.mesh:
            changed.append(f"--config.mesh='{self.mesh}'")
        if self.microbatches != before.microbatches:
            changed.append(f"--config.microbatches={self.microbatches}")
        if self.remat != before.remat:
            changed.append(f"--config.remat={self.remat}")
        return tuple(changed)

    def recomputed(self) -> float:
        """What is computed again, as a share of the FLOPs needed; before anything is compiled.

        Microbatches run forward once for the loss and once more for their gradients.
        """
        share = {"none": 0.0, "full": _BLOCKS}.get(self.remat, _ATTENTION)
        return _FORWARD * (share + (self.microbatches > 1))

    def sent(self) -> float:
        """Traffic in sizes of the weights: gradients there and back, or weights twice and
        gradients, for each microbatch. Activations, over `tensor` or to the host, are far more.
        """
        _, fsdp, tensor = self.mesh
        activations = _MANY * ((tensor > 1) + (self.remat == "offload"))
        return (3.0 * self.microbatches if fsdp > 1 else 2.0) + activations

    def order(self) -> tuple[float, float, int, int, int]:
        """What to try first: least computed again, then least sent, then fewest parts."""
        _, fsdp, tensor = self.mesh
        order = REMATS.index(self.remat)
        return self.recomputed(), self.sent(), order, self.microbatches, tensor * fsdp

    def __str__(self) -> str:
        mesh = "x".join(map(str, self.mesh))
        return f"mesh {mesh}, microbatches {self.microbatches}, remat {self.remat}"


class StateBytes(NamedTuple):
    """On one device: what is there before a step."""

    parameters: int
    rest: int  # optimizer, moving average, statistics

    @property
    def total(self) -> int:
        return self.parameters + self.rest


class Known(NamedTuple):
    """A setting whose memory is known."""

    setting: Setting
    state: StateBytes
    needed_bytes: int


def least_bytes(setting: Setting, state: StateBytes, known: Sequence[Known]) -> int:
    """What `setting` needs at least, by what settings like it need; its state where none is.

    Less of it is kept only by a stronger remat policy, by more microbatches (in inverse proportion
    at best; the first split also runs one tower after the other) or by what a larger fsdp axis
    takes of state and gradients.
    """
    return max([state.total, *(_least(setting, state, one) for one in known)])


def _least(setting: Setting, state: StateBytes, known: Known) -> int:
    if setting.mesh[2] != known.setting.mesh[2]:  # a device then has other rows, too
        return 0
    if setting.remat not in _KEEP_AS_MUCH[known.setting.remat]:
        return 0
    rest = float(known.needed_bytes - known.state.total)
    # Gradients and updates lie as the parameters do.
    rest -= 2 * max(0, known.state.parameters - state.parameters)
    if setting.microbatches > known.setting.microbatches:
        towers = 2 if known.setting.microbatches == 1 else 1
        rest *= known.setting.microbatches / (setting.microbatches * towers)
    return state.total + round(max(0.0, rest))


def meshes_with_fsdp(setting: Setting) -> list[tuple[int, int, int]]:
    """Meshes that share the batch and the heads alike, by the size of fsdp."""
    rows, tensor = math.prod(setting.mesh[:2]), setting.mesh[2]
    return [(rows // fsdp, fsdp, tensor) for fsdp in range(1, rows + 1) if rows % fsdp == 0]


def splits_of_batch(config: ExperimentConfig, mesh: tuple[int, int, int]) -> list[int]:
    """Microbatches to try: 1, 2, 4, ... as far as a device has rows, and the config's own."""
    rows = config.global_batch_size // math.prod(mesh[:2])
    sizes = {2**i for i in range(rows.bit_length()) if rows % 2**i == 0}
    if rows % config.microbatches == 0:
        sizes.add(config.microbatches)
    return sorted(sizes)


def is_valid(setting: Setting, config: ExperimentConfig, topology: Topology) -> bool:
    """Whether heads, batches, packed groups and slices divide as the setting asks."""
    from clip_jax.parallel.mesh import axes_across_slices

    changed = setting.apply(config)
    if setting.microbatches > 1 and config.model.image.kind == "resnet":
        return False  # as `validate` says: a microbatch has statistics of its own
    try:
        sizes = check_devices(changed, topology.num_devices)
        axes_across_slices(changed, sizes, config.num_slices or topology.num_slices)
    except ConfigError:
        return False
    return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """A setting and what came of compiling it."""

    setting: Setting
    verdict: Literal["fits", "too large", "ruled out", "failed", "not tried"]
    needed_bytes: int | None  # at least so many where it is ruled out; None: not known
    reason: str = ""  # in words, where it neither fits nor is too large by the compiler's figures
    step: CompiledStep | None = None

    @property
    def fits(self) -> bool:
        return self.verdict == "fits"
