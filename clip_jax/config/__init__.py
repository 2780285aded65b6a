"""The experiment config: what a recipe states and what a run is made from."""

from clip_jax.config.convert import (
    flatten,
    from_config_dict,
    load_json,
    to_config_dict,
    to_dict,
    to_json,
)
from clip_jax.config.errors import ConfigError, UserError
from clip_jax.config.presets import PRESETS, preset, quick_gelu
from clip_jax.config.schema import (
    MAY_CHANGE_ON_RESUME,
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    EvalSetConfig,
    EvaluationConfig,
    ExperimentConfig,
    ImageTowerConfig,
    LoggingConfig,
    ModelConfig,
    ObjectViewConfig,
    OptimizerConfig,
    ScheduleConfig,
    SourceConfig,
    TextTowerConfig,
    TokenizerConfig,
)
from clip_jax.config.validation import check_devices, validate

__all__ = [
    "MAY_CHANGE_ON_RESUME",
    "PRESETS",
    "AugmentConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EvalSetConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "ImageTowerConfig",
    "LoggingConfig",
    "ModelConfig",
    "ObjectViewConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TextTowerConfig",
    "TokenizerConfig",
    "UserError",
    "check_devices",
    "flatten",
    "from_config_dict",
    "load_json",
    "preset",
    "quick_gelu",
    "to_config_dict",
    "to_dict",
    "to_json",
    "validate",
]
