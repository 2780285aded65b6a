"""Models, configs and meshes small enough for a CPU."""

import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from clip_jax.config import (
    DataConfig,
    ExperimentConfig,
    ImageTowerConfig,
    ModelConfig,
    ScheduleConfig,
    SourceConfig,
    TextTowerConfig,
    TokenizerConfig,
)
from clip_jax.parallel import MESH_AXES


def small_model(**changes: object) -> ModelConfig:
    """A two-tower model of a few thousand parameters; every width is divisible by 8."""
    model = ModelConfig(
        image=ImageTowerConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2),
        text=TextTowerConfig(
            vocab_size=64, eot_id=63, context_length=8, width=32, depth=2, num_heads=2
        ),
        embed_dim=16,
    )
    return dataclasses.replace(model, **changes)


def small_config(**changes: object) -> ExperimentConfig:
    config = ExperimentConfig(
        model=small_model(),
        num_steps=10,
        global_batch_size=32,
        precision="float32",
        schedule=ScheduleConfig(warmup_steps=2),
        data=DataConfig(
            sources={"pairs": SourceConfig(path="pairs.tar")},
            tokenizer=TokenizerConfig(kind="file", path="tokenizer.json"),
        ),
    )
    return dataclasses.replace(config, **changes)


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first data x fsdp x tensor simulated devices."""
    devices = jax.devices()[: data * fsdp * tensor]
    return jax.make_mesh(
        (data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def small_batch(
    config: ExperimentConfig, *, num: int | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Noise pictures, and texts of random length: words, end of text, zeros."""
    rng = np.random.default_rng(seed)
    num, text = num or config.global_batch_size, config.model.text
    size = config.model.image.image_size
    tokens = np.zeros((num, text.context_length), np.int32)
    for row in tokens:
        length = rng.integers(2, text.context_length + 1)
        row[: length - 1] = rng.integers(2, text.eot_id, length - 1)
        row[length - 1] = text.eot_id
    image = rng.integers(0, 256, (num, size, size, 3), dtype=np.uint8)
    return {"image": image, "tokens": tokens}
