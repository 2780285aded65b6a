"""Whether captions may be packed several to a row: a matter of the text tower and of the batch."""

from clip_jax.config.errors import ConfigError
from clip_jax.config.schema import ExperimentConfig, TextTowerConfig

_REMEDY = "use config.data.packing.group_size=0"


def check_packing(text: TextTowerConfig) -> None:
    """Raises ConfigError where captions in one row would change each other's embeddings."""
    if text.kind == "bert":
        reason = "kind 'bert' attends both ways, over the whole row"
    elif text.kind == "cbow":
        reason = "kind 'cbow' is a mean over the row, which costs next to nothing"
    elif not text.causal:
        reason = (
            "causal=False attends both ways and to padding, which is part of the embedding (SigLIP)"
        )
    elif text.pooling != "eot":
        reason = f"pooling '{text.pooling}' reads other tokens of the row than the end of text"
    elif text.eot_id is None:
        reason = "eot_id None leaves no end of text to read an embedding at"
    else:
        return
    raise ConfigError(
        f"config.data.packing needs a causal text tower that pools at the end of text: "
        f"config.model.text.{reason}; {_REMEDY}"
    )


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
