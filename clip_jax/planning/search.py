"""What fits into a device's memory, where the recipe does not: with the least computed again.

Candidates are the remat policies x microbatches (1, 2, 4, ... as far as a device has rows) x sizes
of fsdp (the divisors of data x fsdp; tensor stays). They are tried in this order:

1. By what is computed again, which is what a run pays most for: nothing ('none', one microbatch);
   attention's products ('dots' and 'offload'); a forward pass ('full', or microbatches without
   remat: each runs forward once for the loss and once more for its gradients); a forward pass and
   attention's products; two forward passes.
2. By what is sent: 'data' alone sends gradients once, fsdp weights twice and gradients once, for
   each microbatch; 'offload' sends activations to the host and back, over a slow link, which is
   most.
3. By the parts: fewer microbatches, then a smaller fsdp axis, which more devices share.

The first that fits is the answer. Few are compiled: what a setting needs at least follows from
those that were (`least_bytes`). One that does not fit takes a TPU's compiler from seconds to longer
than one that does, as it looks for room first.
Shares of FLOPs in what is printed are those of the compiled programs.
"""

import dataclasses

from clip_jax.config import ExperimentConfig
from clip_jax.planning.plan_setting import (
    REMATS,
    Attempt,
    Setting,
    is_valid,
    meshes_with_fsdp,
    splits_of_batch,
)
from clip_jax.planning.plan_trials import Trials
from clip_jax.planning.topology import Topology

LIMIT = 12  # compilations: minutes each for large models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What was tried, in order, and the first that fits."""

    attempts: tuple[Attempt, ...]
    chosen: Attempt | None
    num_compiled: int
    limit: int

    @property
    def num_left_out(self) -> int:
        """Because the limit was reached; something may fit among them."""
        return sum(attempt.verdict == "not tried" for attempt in self.attempts)


def candidates(config: ExperimentConfig, topology: Topology) -> list[Setting]:
    """All that may be tried, in the order in which they are."""
    own = Setting.of(config, topology.num_devices)
    settings = [
        Setting(mesh, microbatches, remat)
        for mesh in meshes_with_fsdp(own)
        for microbatches in splits_of_batch(config, mesh)
        for remat in REMATS
        # The host's memory is the CPU's own: there 'offload' is 'dots'.
        if remat != "offload" or topology.platform != "cpu"
    ]
    valid = [setting for setting in settings if is_valid(setting, config, topology)]
    return sorted(valid, key=Setting.order)


def what_fits(config: ExperimentConfig, topology: Topology, trials: Trials) -> Search:
    """Tries candidates until one fits. trials: has compiled the config as it is."""
    own = Setting.of(config, topology.num_devices)
    attempts: list[Attempt] = []
    for setting in candidates(config, topology):
        if setting == own:
            continue
        attempts.append(trials.attempt(setting))
        if attempts[-1].fits:
            break
    chosen = attempts[-1] if attempts and attempts[-1].fits else None
    return Search(
        attempts=tuple(attempts),
        chosen=chosen,
        num_compiled=trials.num_compiled,
        limit=trials.limit,
    )
