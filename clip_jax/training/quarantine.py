"""Samples that a run passes over since its loss went wrong on them."""

import jax

from clip_jax.checkpoint import Workdir, add_quarantine, read_quarantine
from clip_jax.config import UserError
from clip_jax.parallel import from_first_process
from clip_jax.training.stability import LossSpikeError

Range = tuple[int, int]  # of places in the order, the end not included


def listed(workdir: Workdir) -> tuple[Range, ...]:
    """What quarantine.jsonl lists, as the first process reads it, on all of them: a collective."""
    is_first_process = jax.process_index() == 0
    entries = read_quarantine(workdir) if is_first_process else []
    numbers = [number for entry in entries for number in (entry["from"], entry["to"])]
    count = from_first_process(len(numbers))
    numbers = [from_first_process(numbers[i] if is_first_process else 0) for i in range(count)]
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def put_in(workdir: Workdir, spike: LossSpikeError, places: Range, *, max_rewinds: int) -> None:
    """Lists the samples of a spike, so that the run passes over them from now on.

    Raises UserError where it went back so often already: a collective.
    """
    if len(listed(workdir)) >= max_rewinds:
        raise UserError(
            f"{spike}, and the run went back as often as config.stability.max_rewinds "
            f"{max_rewinds} allows; lower config.optimizer.learning_rate or raise max_rewinds"
        )
    if jax.process_index() == 0:
        entry = {"from": places[0], "to": places[1], "step": spike.step}
        add_quarantine(workdir, entry | {"loss": spike.loss, "zscore": round(spike.zscore, 2)})
