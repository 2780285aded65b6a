"""Named architectures: `preset(name)` gives one; open_clip's names wherever it has the model."""

import difflib

from clip_jax.config.errors import ConfigError
from clip_jax.config.preset_families import PRESET_FAMILIES
from clip_jax.config.presets_clip import CLIP_MODELS, quick_gelu
from clip_jax.config.presets_siglip import SIGLIP_MODELS
from clip_jax.config.schema import ModelConfig

__all__ = ["PRESETS", "PRESET_FAMILIES", "preset", "quick_gelu"]

PRESETS: dict[str, ModelConfig] = {model.name: model for model in CLIP_MODELS + SIGLIP_MODELS}


def preset(name: str) -> ModelConfig:
    """The named architecture. Raises ConfigError with the nearest name."""
    if name not in PRESETS:
        spelled = {known.lower(): known for known in PRESETS}
        near = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.3)
        hint = f"; did you mean {spelled[near[0]]}?" if near else ""
        raise ConfigError(f"unknown model {name!r}{hint} (`clip-jax models` lists all)")
    return PRESETS[name]
