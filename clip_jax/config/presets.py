"""Named architectures, as data. Figures: Radford et al. 2021, tables 19 and 20; open_clip."""

import dataclasses
import difflib

from clip_jax.config.errors import ConfigError
from clip_jax.config.schema import ImageTowerConfig, ModelConfig, TextTowerConfig


def _clip(
    name: str,
    *,
    image: tuple[int, int, int],
    text: tuple[int, int, int],
    patch_size: int,
    embed_dim: int,
    image_size: int = 224,
) -> ModelConfig:
    """`image` and `text` are (width, depth, heads)."""
    width, depth, heads = image
    text_width, text_depth, text_heads = text
    return ModelConfig(
        name=name,
        embed_dim=embed_dim,
        image=ImageTowerConfig(
            image_size=image_size, patch_size=patch_size, width=width, depth=depth, num_heads=heads
        ),
        text=TextTowerConfig(width=text_width, depth=text_depth, num_heads=text_heads),
    )


_S, _B, _L = (384, 12, 6), (768, 12, 12), (1024, 24, 16)
_TEXT_S, _TEXT_B, _TEXT_L = (384, 12, 6), (512, 12, 8), (768, 12, 12)

PRESETS: dict[str, ModelConfig] = {
    model.name: model
    for model in (
        _clip("ViT-S-32", image=_S, text=_TEXT_S, patch_size=32, embed_dim=384),
        _clip("ViT-S-16", image=_S, text=_TEXT_S, patch_size=16, embed_dim=384),
        _clip("ViT-B-32", image=_B, text=_TEXT_B, patch_size=32, embed_dim=512),
        _clip("ViT-B-16", image=_B, text=_TEXT_B, patch_size=16, embed_dim=512),
        _clip("ViT-L-16", image=_L, text=_TEXT_L, patch_size=16, embed_dim=768),
        _clip("ViT-L-14", image=_L, text=_TEXT_L, patch_size=14, embed_dim=768),
        _clip("ViT-L-14-336", image=_L, text=_TEXT_L, patch_size=14, embed_dim=768, image_size=336),
    )
}


def quick_gelu(model: ModelConfig) -> ModelConfig:
    """The same model with x * sigmoid(1.702 x), as in OpenAI's released weights."""
    return dataclasses.replace(
        model,
        name=f"{model.name}-quickgelu",
        image=dataclasses.replace(model.image, activation="quick_gelu"),
        text=dataclasses.replace(model.text, activation="quick_gelu"),
    )


PRESETS |= {
    quick_gelu(PRESETS[name]).name: quick_gelu(PRESETS[name])
    for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")
}


def preset(name: str) -> ModelConfig:
    """The named architecture. Raises ConfigError with the nearest name."""
    if name not in PRESETS:
        spelled = {known.lower(): known for known in PRESETS}
        near = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.3)
        hint = f"; did you mean {spelled[near[0]]}?" if near else ""
        raise ConfigError(f"unknown model {name!r}{hint} (known: {', '.join(PRESETS)})")
    return PRESETS[name]
