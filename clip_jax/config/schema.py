"""The experiment config: every default of the project, and nothing else.

Frozen, keyword-only dataclasses. `convert.py` turns them into the ConfigDict that recipes return
and back; `validation.py` checks them. A field that takes `None` means "not set".
"""

from dataclasses import dataclass, field
from typing import Literal

from clip_jax.config.schema_data import (
    AugmentConfig,
    DataConfig,
    ObjectViewConfig,
    PackingConfig,
    SourceConfig,
    SourceKind,
    StreamConfig,
    TokenizerConfig,
)
from clip_jax.config.schema_model import (
    Activation,
    ImageTowerConfig,
    ModelConfig,
    Projection,
    TextTowerConfig,
)
from clip_jax.config.schema_training import (
    CheckpointConfig,
    EvalSetConfig,
    EvaluationConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    StabilityConfig,
    StartConfig,
    TowerRateConfig,
)

__all__ = [
    "MAY_CHANGE_ON_RESUME",
    "Activation",
    "AugmentConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvalSetConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "ImageTowerConfig",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "ObjectViewConfig",
    "OptimizerConfig",
    "PackingConfig",
    "Projection",
    "ScheduleConfig",
    "SourceConfig",
    "SourceKind",
    "StabilityConfig",
    "StartConfig",
    "StreamConfig",
    "TextTowerConfig",
    "TokenizerConfig",
    "TowerRateConfig",
]


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """All of a run. The resolved one is saved as `config.json` and is enough to rerun it."""

    name: str = "experiment"
    seed: int = 0
    num_steps: int = 100_000
    num_samples_seen: int | None = None  # sets num_steps where given: whole batches of it
    num_epochs: float | None = None  # sets num_steps where given
    epoch_samples: int | None = None  # samples in an epoch; None: counted when a run starts
    global_batch_size: int = 1024
    microbatches: int = 1  # the towers run on this many slices; the loss is over the whole batch
    mesh: tuple[int, int, int] = (-1, 1, 1)  # devices along data, fsdp, tensor; -1: the rest
    num_slices: int | None = None  # of devices that a slow network joins; None: as they tell
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # of the towers' arithmetic
    remat: Literal["none", "dots", "full", "offload"] = "none"  # what is computed again going back
    layers: Literal["auto", "scan", "unroll"] = "auto"  # auto: unrolled on GPUs
    deterministic: bool = False  # on GPUs: the same bits in every run, for some speed
    heartbeat_seconds: int = 100  # without a sign of a process before the others stop
    model: ModelConfig = field(default_factory=ModelConfig)
    start: StartConfig = field(default_factory=StartConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


# On resume these may differ from the saved config (the difference is logged): they change where
# and how fast a run computes, not what.
MAY_CHANGE_ON_RESUME = (
    "mesh",
    "microbatches",
    "num_slices",
    "remat",
    "layers",
    "heartbeat_seconds",
    "start.model",
    "start.image",
    "start.text",
    "start.branch",
    "start.step",
    "start.use_ema",
    "start.weights_only",
    "loss.tile_size",
    "loss.bidirectional",
    "data.skipped_ranges",
    "data.read_retries",
    "data.num_workers",
    "data.num_threads",
    "data.prefetch_batches",
    "data.cache_dir",
    "data.packing",
    "stability",
    "evaluation",
    "checkpoint",
    "logging",
)
