"""What a run finds out from its data, assumed where a plan has none."""

import dataclasses

from clip_jax.config import ExperimentConfig, PackingConfig, check_devices
from clip_jax.config.lengths import lengths_are_known
from clip_jax.config.packing import choose_group_size

# Rows of a packed group as a share of its captions, in rows of 77 tokens, for captions like
# DataComp-1B's (16 tokens on average): docs/data.md.
_ROWS = {64: 0.30, 32: 0.34, 16: 0.38, 8: 0.50}
_LENGTH, _TOKENS = 77, 16
_MOST_ROWS = 0.9  # as a run packs nothing where it saves less


def assume(config: ExperimentConfig, num_devices: int) -> tuple[ExperimentConfig, tuple[str, ...]]:
    """The config as a run would complete it, and what was assumed for that, a sentence each.

    num_devices: all of them. Raises ConfigError where the mesh does not go with them.
    """
    stated = []
    packing = config.data.packing
    if packing.group_size is None or (packing.group_size and packing.rows is None):
        packing, sentence = _packing(config, num_devices)
        data = dataclasses.replace(config.data, packing=packing)
        config = dataclasses.replace(config, data=data)
        stated += [sentence] if sentence else []
    if not lengths_are_known(config):
        stated.append(
            f"lengths are in epochs of a number of samples that is not given: {config.num_steps:,} "
            "steps stand in; --config.epoch_samples=N gives it"
        )
    return config, tuple(stated)


def _packing(config: ExperimentConfig, num_devices: int) -> tuple[PackingConfig, str]:
    given, length = config.data.packing.group_size, config.model.text.context_length
    group = given
    if group is None:
        data, fsdp, _ = check_devices(config, num_devices)
        group = choose_group_size(config, data * fsdp)
    if not group:
        return PackingConfig(group_size=0), ""
    tokens = min(_TOKENS, length)  # longer ones are cut
    share = next((share for size, share in _ROWS.items() if group >= size), 1.0)
    rows = min(group, -(-group * share * _LENGTH // length))
    if given is None and rows > _MOST_ROWS * group:
        return PackingConfig(group_size=0), (
            f"captions of {tokens} tokens on average, a caption to a row: in rows of {length} "
            "packing saves little; a run measures its own at its first start"
        )
    return PackingConfig(group_size=group, rows=int(rows)), (
        f"captions of {tokens} tokens on average, so that {group} share {int(rows)} rows of "
        f"{length}; a run measures its own at its first start, and --config.data.packing.rows "
        "with group_size gives them"
    )
