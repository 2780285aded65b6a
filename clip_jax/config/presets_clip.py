"""Architectures trained with the softmax loss, as data: CLIP and its kin, CLIPA, LiT, baselines.

Figures: Radford et al. 2021, tables 19 and 20, and the model configs and preprocessing that come
with open_clip 3.3.0, for every model that it names; Zhai et al. 2022 and its configs for LiT.
"""

import dataclasses
from typing import Any, NamedTuple

from clip_jax.config.schema import ImageTowerConfig, ModelConfig, TextTowerConfig


class Size(NamedTuple):
    """The shape of a Transformer."""

    width: int
    depth: int
    num_heads: int
    mlp_width: int

    def fields(self) -> dict[str, Any]:
        """The same as fields of a tower's config, where the MLP has a ratio."""
        return {
            "width": self.width,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_width / self.width,
        }


# Names as in Zhai et al. 2022 ("Scaling vision transformers", table 2), M and B+ as in open_clip.
TI = Size(192, 12, 3, 768)
S = Size(384, 12, 6, 1536)
M = Size(512, 12, 8, 2048)
B = Size(768, 12, 12, 3072)
B_PLUS = Size(896, 12, 14, 3584)
L = Size(1024, 24, 16, 4096)
SO400M = Size(1152, 27, 16, 4304)  # Alabdulmohsin et al. 2023
H = Size(1280, 32, 16, 5120)
SMALL_G = Size(1408, 40, 16, 6144)
G_OPT = Size(1536, 40, 16, 6144)  # SigLIP 2
BIG_G = Size(1664, 48, 16, 8192)

_TEXT_ALT = Size(256, 10, 4, 1024)
_TEXT_PLUS = Size(640, 12, 10, 2560)
_TEXT_RN50X64 = Size(1024, 12, 16, 4096)
_TEXT_BIG_G = Size(1280, 32, 20, 5120)

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)  # as mean and as std: pixels in [-1, 1]

_BERT_VOCAB_SIZE, _BERT_SEPARATOR_ID = 30522, 102


def quick_gelu(model: ModelConfig) -> ModelConfig:
    """The same model with x * sigmoid(1.702 x), as in OpenAI's released weights."""
    return dataclasses.replace(
        model,
        name=f"{model.name}-quickgelu",
        image=dataclasses.replace(model.image, activation="quick_gelu"),
        text=dataclasses.replace(model.text, activation="quick_gelu"),
    )


def _both(model: ModelConfig) -> tuple[ModelConfig, ModelConfig]:
    return model, quick_gelu(model)


def _clip(
    name: str,
    image: Size,
    patch_size: int,
    text: Size,
    embed_dim: int,
    *,
    image_size: int = 224,
    image_fields: dict[str, Any] | None = None,
    text_fields: dict[str, Any] | None = None,
) -> ModelConfig:
    """CLIP with a Vision Transformer: the defaults of the schema, but for the sizes."""
    return ModelConfig(
        name=name,
        embed_dim=embed_dim,
        image=ImageTowerConfig(
            image_size=image_size,
            patch_size=patch_size,
            **image.fields(),
            **(image_fields or {}),
        ),
        text=TextTowerConfig(**text.fields(), **(text_fields or {})),
    )


def _resnet(
    name: str, layers: tuple[int, ...], width: int, text: Size, embed_dim: int, image_size: int
) -> ModelConfig:
    return ModelConfig(
        name=name,
        embed_dim=embed_dim,
        image_projection="none",  # the attention pooling gives the embedding
        image=ImageTowerConfig(
            kind="resnet",
            image_size=image_size,
            patch_size=32,
            resnet_layers=layers,
            width=width,
            num_heads=32 * width // 64,  # of the pooling: 64 channels each
            pooling="attention",
            class_token=False,
            pre_norm=False,
        ),
        text=TextTowerConfig(**text.fields()),
    )


def _worldwide(model: ModelConfig, **image_fields: Any) -> ModelConfig:
    """MetaCLIP 2: CLIP with the vocabulary of XLM-V."""
    name = model.name.replace("-14", "-14-worldwide", 1)
    text = dataclasses.replace(model.text, vocab_size=901_629, eot_id=2, pad_id=1)
    image = dataclasses.replace(model.image, **image_fields)
    return dataclasses.replace(model, name=name, image=image, text=text)


def _clipa(model: ModelConfig, image_size: int) -> ModelConfig:
    """CLIPA (Li et al. 2023): mean pooling, 32 BERT tokens without [SEP], no causal mask."""
    size = "" if image_size == 224 else f"-{image_size}"
    return dataclasses.replace(
        model,
        name=f"{model.name}-CLIPA{size}",
        image=dataclasses.replace(
            model.image,
            image_size=image_size,
            pre_norm=False,
            pooling="mean",
            norm_after_pooling=True,
            mean=_IMAGENET_MEAN,
            std=_IMAGENET_STD,
            resize="squash",
            interpolation="bilinear",
        ),
        text=dataclasses.replace(
            model.text,
            causal=False,
            vocab_size=32_000,  # more than BERT's vocabulary has
            context_length=32,
            eot_id=None,
            pooling="last",
        ),
    )


def _bert(size: Size, **fields: Any) -> TextTowerConfig:
    """BERT (Devlin et al. 2019), uncased."""
    return TextTowerConfig(
        kind="bert",
        causal=False,
        vocab_size=_BERT_VOCAB_SIZE,
        eot_id=_BERT_SEPARATOR_ID,
        layer_norm_epsilon=1e-12,
        **size.fields(),
        **fields,
    )


def _lit(name: str, image: Size, text: Size) -> ModelConfig:
    """LiT (Zhai et al. 2022): a classifier's ViT without its head, to be locked, and BERT."""
    return ModelConfig(
        name=name,
        embed_dim=image.width,
        image_projection="none",
        text_projection="linear_bias",
        logit_scale_init=10.0,
        image=ImageTowerConfig(
            patch_size=16,
            patch_bias=True,
            activation="gelu_tanh",  # what flax's gelu is, with which these ViTs were trained
            layer_norm_epsilon=1e-6,
            pre_norm=False,
            mean=HALF,
            std=HALF,
            resize="squash",
            interpolation="bilinear",
            **image.fields(),
        ),
        text=_bert(text, context_length=16, pooling="class_token"),
    )


_VIT_B_32 = _clip("ViT-B-32", B, 32, M, 512)
_VIT_L_14 = _clip("ViT-L-14", L, 14, B, 768)
_VIT_H_14 = _clip("ViT-H-14", H, 14, L, 1024)
_VIT_H_14_378 = _clip("ViT-H-14-378", H, 14, L, 1024, image_size=378)
_VIT_BIG_G_14 = _clip("ViT-bigG-14", BIG_G, 14, _TEXT_BIG_G, 1280)
_VIT_BIG_G_14_378 = _clip("ViT-bigG-14-378", BIG_G, 14, _TEXT_BIG_G, 1280, image_size=378)

CLIP_MODELS: tuple[ModelConfig, ...] = (
    *_both(_resnet("RN50", (3, 4, 6, 3), 64, M, 1024, 224)),
    *_both(_resnet("RN101", (3, 4, 23, 3), 64, M, 512, 224)),
    *_both(_resnet("RN50x4", (4, 6, 10, 6), 80, _TEXT_PLUS, 640, 288)),
    *_both(_resnet("RN50x16", (6, 8, 18, 8), 96, B, 768, 384)),
    *_both(_resnet("RN50x64", (3, 15, 36, 10), 128, _TEXT_RN50X64, 1024, 448)),
    _clip("ViT-Ti-16", TI, 16, TI, 192),
    _clip("ViT-S-32", S, 32, S, 384),
    _clip("ViT-S-32-alt", S, 32, _TEXT_ALT, 256),
    _clip("ViT-S-16", S, 16, S, 384),
    _clip("ViT-S-16-alt", S, 16, _TEXT_ALT, 256),
    _clip("ViT-M-32", M, 32, M, 512),
    _clip("ViT-M-32-alt", M, 32, S, 384),
    _clip("ViT-M-16", M, 16, M, 512),
    _clip("ViT-M-16-alt", M, 16, S, 384, image_fields={"layer_scale_init": 1e-4}),
    *_both(_VIT_B_32),
    _clip("ViT-B-32-256", B, 32, M, 512, image_size=256),
    _clip("ViT-B-32-plus-256", B_PLUS, 32, _TEXT_PLUS, 640, image_size=256),
    *_both(_clip("ViT-B-16", B, 16, M, 512)),
    _clip("ViT-B-16-plus", B_PLUS, 16, _TEXT_PLUS, 640),
    _clip("ViT-B-16-plus-240", B_PLUS, 16, _TEXT_PLUS, 640, image_size=240),
    _clip("ViT-B-8", B, 8, M, 512),
    _clip("ViT-L-16", L, 16, B, 768),
    _clip("ViT-L-16-320", L, 16, B, 768, image_size=320),
    *_both(_VIT_L_14),
    _clip("ViT-L-14-280", L, 14, B, 768, image_size=280),
    *_both(_clip("ViT-L-14-336", L, 14, B, 768, image_size=336)),
    _clip("ViT-H-16", H, 16, L, 1024),
    *_both(_VIT_H_14),
    # Its one public checkpoint, DFN-5B, is for squashed images.
    quick_gelu(
        dataclasses.replace(
            _VIT_H_14_378, image=dataclasses.replace(_VIT_H_14_378.image, resize="squash")
        )
    ),
    _clip("ViT-g-14", SMALL_G, 14, L, 1024),
    *_both(_VIT_BIG_G_14),
    quick_gelu(_worldwide(_VIT_H_14)),
    _worldwide(_VIT_H_14_378, resize="squash"),
    _worldwide(_VIT_BIG_G_14),
    _worldwide(_VIT_BIG_G_14_378, resize="squash"),
    _clipa(_VIT_L_14, 224),
    _clipa(_VIT_L_14, 336),
    _clipa(_VIT_H_14, 224),
    _clipa(_VIT_H_14, 336),
    _clipa(_VIT_BIG_G_14, 224),
    _clipa(_VIT_BIG_G_14, 336),
    _lit("LiT-B-16-BERT-B", B, B),
    _lit("LiT-L-16-BERT-L", L, L),
    # As open_clip builds a model on a Hugging Face text encoder.
    dataclasses.replace(
        _VIT_B_32, name="ViT-B-32-BERT", text=_bert(B, pooling="mean"), text_projection="mlp"
    ),
    dataclasses.replace(
        _VIT_B_32,
        name="ViT-B-32-CBOW",
        text=TextTowerConfig(kind="cbow", causal=False, pooling="mean", **M.fields()),
    ),
)
