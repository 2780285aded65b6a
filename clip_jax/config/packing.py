"""Whether captions may be packed several to a row: a matter of the text tower and of the batch."""

from clip_jax.config.errors import ConfigError
from clip_jax.config.schema import ExperimentConfig, TextTowerConfig

_REMEDY = "use config.data.packing.group_size=0"
_GROUP_SIZES = (64, 32, 16, 8)  # of which the largest that fits is chosen; docs/data.md: savings


def why_not_packed(text: TextTowerConfig) -> str | None:
    """Why captions in one row would change each other's embeddings; None where they would not."""
    if text.kind == "bert":
        return "kind 'bert' attends both ways, over the whole row"
    if text.kind == "cbow":
        return "kind 'cbow' is a mean over the row, which costs next to nothing"
    if not text.causal:
        return (
            "causal=False attends both ways and to padding, which is part of the embedding (SigLIP)"
        )
    if text.pooling != "eot":
        return f"pooling '{text.pooling}' reads other tokens of the row than the end of text"
    if text.eot_id is None:
        return "eot_id None leaves no end of text to read an embedding at"
    return None


def check_packing(text: TextTowerConfig) -> None:
    """Raises ConfigError where captions in one row would change each other's embeddings."""
    if reason := why_not_packed(text):
        raise ConfigError(
            f"config.data.packing needs a causal text tower that pools at the end of text: "
            f"config.model.text.{reason}; {_REMEDY}"
        )


def choose_group_size(config: ExperimentConfig, num_devices: int) -> int:
    """The largest group that lies in a microbatch of each of `num_devices` devices.

    0, a caption to a row, where packing would not be exact or no group of eight or more divides.
    num_devices: as for `check_packed_batch`.
    """
    if why_not_packed(config.model.text):
        return 0
    samples = config.global_batch_size // (num_devices * config.microbatches)
    return next((size for size in _GROUP_SIZES if samples % size == 0), 0)


def check_packed_batch(config: ExperimentConfig, num_devices: int = 1) -> None:
    """Raises ConfigError where a group would lie across microbatches or devices.

    num_devices: those that share the batch (data x fsdp). `global_batch_size` is divisible by
    devices x microbatches. Nothing is asked where captions are not packed.
    """
    group = config.data.packing.group_size
    if not group:
        return
    samples = config.global_batch_size // (num_devices * config.microbatches)
    if samples % group:
        below = next(size for size in range(min(group, samples), 0, -1) if samples % size == 0)
        raise ConfigError(
            f"config.data.packing.group_size {group} does not divide the {samples} samples of a "
            f"device in a microbatch (global_batch_size {config.global_batch_size} / {num_devices} "
            f"data-parallel devices / {config.microbatches} microbatches); nearest: {below}"
        )
