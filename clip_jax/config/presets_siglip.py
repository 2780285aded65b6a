"""Architectures trained with the sigmoid loss, as data: SigLIP, SigLIP 2 and its NaFlex models.

Figures: Zhai et al. 2023 and Tschannen et al. 2025 with the configs that big_vision released, and
the model configs of open_clip 3.3.0. The activation is tanh-GELU, with which big_vision trained, as
in transformers; open_clip runs the first SigLIP's B, L and So400m/14 with the exact GELU.
"""

from clip_jax.config.presets_clip import G_OPT, HALF, SO400M, B, L, Size
from clip_jax.config.schema import ImageTowerConfig, ModelConfig, TextTowerConfig

_VOCAB_V1, _VOCAB_I18N, _VOCAB_V2 = 32_000, 250_000, 256_000  # C4, mC4, Gemma
_PAD_ID = {_VOCAB_V1: 1, _VOCAB_I18N: 1, _VOCAB_V2: 0}  # all end a text with token 1


def _siglip(
    name: str,
    image: Size,
    patch_size: int,
    image_size: int,
    vocab_size: int,
    *,
    text: Size | None = None,
    context_length: int = 64,
    text_head: bool = True,
    naflex: bool = False,
) -> ModelConfig:
    """`text`: the size of the text tower, if it is not that of the image tower."""
    return ModelConfig(
        name=name,
        embed_dim=image.width,
        image_projection="none",  # attention pooling ends in an MLP
        text_projection="linear_bias" if text_head else "none",
        logit_scale_init=10.0,
        logit_bias_init=-10.0,
        logit_scale_max=1000.0,  # never reached: big_vision sets no limit, and 117 is usual
        image=ImageTowerConfig(
            kind="naflex" if naflex else "vit",
            image_size=image_size,
            patch_size=patch_size,
            patch_bias=True,
            activation="gelu_tanh",
            layer_norm_epsilon=1e-6,
            class_token=False,
            pre_norm=False,
            pooling="attention",
            mean=HALF,
            std=HALF,
            resize="squash",
            interpolation="bilinear" if naflex else "bicubic",  # as transformers, as open_clip
            **image.fields(),
        ),
        text=TextTowerConfig(
            causal=False,
            vocab_size=vocab_size,
            context_length=context_length,
            eot_id=1,
            pad_id=_PAD_ID[vocab_size],
            pooling="last",
            activation="gelu_tanh",
            layer_norm_epsilon=1e-6,
            **(text or image).fields(),
        ),
    )


SIGLIP_MODELS: tuple[ModelConfig, ...] = (
    _siglip("ViT-B-16-SigLIP", B, 16, 224, _VOCAB_V1),
    _siglip("ViT-B-16-SigLIP-256", B, 16, 256, _VOCAB_V1),
    _siglip("ViT-B-16-SigLIP-384", B, 16, 384, _VOCAB_V1),
    _siglip("ViT-B-16-SigLIP-512", B, 16, 512, _VOCAB_V1),
    _siglip("ViT-B-16-SigLIP-i18n-256", B, 16, 256, _VOCAB_I18N),
    _siglip("ViT-L-16-SigLIP-256", L, 16, 256, _VOCAB_V1),
    _siglip("ViT-L-16-SigLIP-384", L, 16, 384, _VOCAB_V1),
    _siglip("ViT-SO400M-14-SigLIP", SO400M, 14, 224, _VOCAB_V1, context_length=16),
    # 384 pixels are 27 patches of 14 and a rest of 6, which nothing looks at: 378.
    _siglip("ViT-SO400M-14-SigLIP-378", SO400M, 14, 378, _VOCAB_V1),
    _siglip("ViT-SO400M-16-SigLIP-i18n-256", SO400M, 16, 256, _VOCAB_I18N, text_head=False),
    _siglip("ViT-B-32-SigLIP2-256", B, 32, 256, _VOCAB_V2),
    _siglip("ViT-B-16-SigLIP2", B, 16, 224, _VOCAB_V2),
    _siglip("ViT-B-16-SigLIP2-256", B, 16, 256, _VOCAB_V2),
    _siglip("ViT-B-16-SigLIP2-384", B, 16, 384, _VOCAB_V2),
    _siglip("ViT-B-16-SigLIP2-512", B, 16, 512, _VOCAB_V2),
    _siglip("ViT-L-16-SigLIP2-256", L, 16, 256, _VOCAB_V2),
    _siglip("ViT-L-16-SigLIP2-384", L, 16, 384, _VOCAB_V2),
    _siglip("ViT-L-16-SigLIP2-512", L, 16, 512, _VOCAB_V2),
    _siglip("ViT-SO400M-14-SigLIP2", SO400M, 14, 224, _VOCAB_V2),
    _siglip("ViT-SO400M-14-SigLIP2-378", SO400M, 14, 378, _VOCAB_V2),
    _siglip("ViT-SO400M-16-SigLIP2-256", SO400M, 16, 256, _VOCAB_V2),
    _siglip("ViT-SO400M-16-SigLIP2-384", SO400M, 16, 384, _VOCAB_V2),
    _siglip("ViT-SO400M-16-SigLIP2-512", SO400M, 16, 512, _VOCAB_V2),
    _siglip("ViT-gopt-16-SigLIP2-256", G_OPT, 16, 256, _VOCAB_V2, text=SO400M),
    _siglip("ViT-gopt-16-SigLIP2-384", G_OPT, 16, 384, _VOCAB_V2, text=SO400M),
    _siglip("ViT-B-16-SigLIP2-NaFlex", B, 16, 256, _VOCAB_V2, naflex=True),
    _siglip("ViT-SO400M-16-SigLIP2-NaFlex", SO400M, 16, 256, _VOCAB_V2, naflex=True),
)
