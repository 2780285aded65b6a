"""The config of a model: its two towers and where they meet."""

from dataclasses import dataclass, field
from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]
Projection = Literal["linear", "linear_bias", "mlp", "none"]
POOLS_ONE_TOKEN = ("class_token", "eot", "last")


@dataclass(frozen=True, kw_only=True)
class ImageTowerConfig:
    """An image encoder. Defaults: ViT-B/32 as trained by CLIP.

    kind 'vit': a Vision Transformer (Dosovitskiy et al. 2021). 'naflex': one for images of any
    size and shape, as padded sequences of at most `max_num_patches` patches, with position
    embeddings resampled from the grid of `image_size` (SigLIP 2, Tschannen et al. 2025). 'resnet':
    CLIP's ResNet with attention pooling (Radford et al. 2021); `width` is that of its first stage,
    `num_heads` and `patch_size` (its stride, 32) those of the pooling, `depth` is not used.
    """

    kind: Literal["vit", "naflex", "resnet"] = "vit"
    image_size: int = 224  # pixels, height = width
    patch_size: int = 32  # pixels; with a conv stem: its total stride
    patch_bias: bool = False  # of the patch embedding
    # Pixels beyond the last whole patch are left out, as by a strided convolution: SigLIP So400m/14
    # at 384 sees 378. Otherwise image_size must be a multiple of patch_size.
    crop_to_patches: bool = False
    max_num_patches: int = 256  # naflex: the length of a sequence
    stem: Literal["patch", "conv"] = "patch"  # conv: Xiao et al. 2021, strided 3x3 convolutions
    stem_widths: tuple[int, ...] = ()  # channels after each convolution
    stem_strides: tuple[int, ...] = ()  # of each; patch_size is a multiple of their product
    resnet_layers: tuple[int, ...] = ()  # blocks of each of the four stages
    batch_norm: Literal["global", "local"] = "global"  # statistics of the batch, or of groups of it
    batch_norm_group_size: int = 64  # samples of a group, with 'local'
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    activation: Activation = "gelu"
    layer_norm_epsilon: float = 1e-5
    layer_scale_init: float | None = None  # LayerScale (Touvron et al. 2021); None: without
    qk_norm: bool = False  # layer norm of queries and keys (Dehghani et al. 2023)
    position_embedding: Literal["learned", "sincos2d"] = "learned"  # 2-D: Chen et al. 2021 (MoCo 3)
    class_token: bool = True
    num_registers: int = 0  # Darcet et al. 2024
    pre_norm: bool = True  # layer norm on the embeddings before the first block, as in CLIP
    pooling: Literal["class_token", "mean", "attention", "none"] = "class_token"
    norm_after_pooling: bool = False  # the final layer norm after 'mean' pooling, as in CLIPA
    patch_dropout: float = 0.0  # share of patches left out in training (FLIP, Li et al. 2023)
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP, of [0, 1]
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    # How an image comes to `image_size` for evaluation: 'shortest' resizes the shorter side and
    # crops the centre, 'squash' resizes both sides (SigLIP). naflex keeps the aspect ratio.
    resize: Literal["shortest", "squash"] = "shortest"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """A text encoder. Defaults: the causal Transformer of CLIP ViT-B (Radford et al. 2021).

    kind 'transformer': pre-norm blocks, causal or bidirectional (SigLIP: not causal, pooling
    'last'). 'bert': post-norm blocks with segment embeddings and masked padding (Devlin et al.
    2019). 'cbow': mean of the embeddings of the real tokens; depth and heads are not used.
    """

    kind: Literal["transformer", "bert", "cbow"] = "transformer"
    causal: bool = True
    vocab_size: int = 49408
    context_length: int = 77  # tokens, begin and end of text included
    eot_id: int | None = 49407  # end of text: CLIP's vocabulary; None: the tokenizer adds none
    pad_id: int = 0
    # eot: at the first end of text; last: the last position, padding or not; mean: real tokens.
    pooling: Literal["eot", "last", "class_token", "mean", "attention"] = "eot"
    pooler: bool = False  # BERT's dense layer and tanh after 'class_token' pooling
    num_segments: int = 2  # of BERT; a caption is all of segment 0
    width: int = 512
    depth: int = 12
    num_heads: int = 8
    mlp_ratio: float = 4.0
    activation: Activation = "gelu"
    layer_norm_epsilon: float = 1e-5
    token_embedding_std: float = 0.02  # at initialisation


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Two towers and the space they meet in. `presets.py` has the named ones."""

    name: str = "custom"
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    embed_dim: int = 512
    image_projection: Projection = "linear"  # none: the tower's width is embed_dim
    text_projection: Projection = "linear"  # mlp: two layers with a GELU, as open_clip's
    logit_scale_init: float = 1 / 0.07  # the multiplier, not its logarithm
    logit_scale_max: float = 100.0
    logit_bias_init: float | None = None  # None: no bias; SigLIP: -10, with a scale of 10
