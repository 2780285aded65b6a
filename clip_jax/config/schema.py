"""The experiment config: every default of the project, and nothing else.

Frozen, keyword-only dataclasses. `convert.py` turns them into the ConfigDict that recipes return
and back; `validation.py` checks them. A field that takes `None` means "not set".
"""

from dataclasses import dataclass, field
from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]
Projection = Literal["linear", "linear_bias", "mlp", "none"]


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


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """Weights that a run starts from, each the workdir of a run or of `clip-jax import`.

    `model` also brings its architecture, tokenizer, preprocessing and kind of loss in place of the
    recipe's; `image` and `text` bring those of one tower. Settings on the command line come after
    them: learned position embeddings are resampled to another `image_size`.
    """

    model: str | None = None  # both towers, projections, scale and bias
    image: str | None = None  # the image tower alone
    text: str | None = None  # the text tower alone
    lock: tuple[Literal["image", "text"], ...] = ()  # towers left as they are (Zhai et al. 2022)


SourceKind = Literal[
    "webdataset", "tfds", "parquet", "table", "folder", "array_record", "quickstart"
]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One set of image-text pairs.

    kind 'webdataset': `path` is tar files, with brace expansion (`a-{000..131}.tar`) and globs,
    several separated by commas, local or by a URL (gs://, s3://, https://). 'tfds': a prepared set,
    `name`, `name/config` or `name:version`. 'parquet': parquet or arrow files, 'table': CSV, TSV or
    JSONL files of image paths and captions, 'array_record': files of serialised tf.Example; their
    paths as for tars. 'folder': images with a .txt of the same name, or folders named by a class.
    'quickstart': a split of the emoji set.
    """

    kind: SourceKind = "webdataset"
    path: str = ""
    split: str = "train"  # of a 'tfds' set
    access: Literal["random", "stream"] = "random"  # stream: tars read in sequence, for buckets
    weight: float = 1.0  # share of the mixture, relative to the other sources
    image_key: str = ""  # column or feature that holds the image or its path; "": found by its name
    caption_keys: tuple[str, ...] = ()  # json fields, columns or features; (): the usual names
    caption_weights: tuple[float, ...] = ()  # probability of each of caption_keys, in any unit
    templates: tuple[str, ...] = ("{}",)  # prompts, of sets that have classes in place of captions
    captions: Literal["first", "random"] = "random"  # where a sample has several
    first_caption: float | None = None  # with 'random': probability of the first; None: as others


@dataclass(frozen=True, kw_only=True)
class ObjectViewConfig:
    """Augmentation where `data.framing` is 'object'. By default size and place alone vary."""

    scale: tuple[float, float] = (0.75, 1.0)  # the object's longer side, as a share of the image's
    stretch: float = 0.0  # range of ln(width / height), half of it either way
    rotation: float = 0.0  # probability, as are the next ones
    color: float = 0.0
    grayscale: float = 0.0  # among those whose colours change
    pale: float = 0.0  # light areas washed out towards white, dark lines kept
    angle: float = 0.2  # of a rotation: most, radians
    shear: float = 0.0  # with a rotation: most
    hue: float = 0.3  # of a change of colour: turn about the gray axis, standard deviation, radians
    saturation: tuple[float, float] = (0.3, 1.5)  # factor
    contrast: float = 0.25  # factor in 1 +- value, about medium gray
    brightness: float = 0.15  # shift by +- value of the full range


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Training-time image augmentation. Every probability 0 and crop_scale (1, 1): none.

    The fields up to `grayscale` serve `data.framing` 'crop', of them `horizontal_flip` both.
    """

    crop_scale: tuple[float, float] = (0.9, 1.0)  # share of the area kept, as open_clip
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    horizontal_flip: float = 0.0  # probability, as are the next ones
    color_jitter: float = 0.0
    brightness: float = 0.4  # jitter strengths: factor in 1 +- value; hue: +- value of a turn
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grayscale: float = 0.0
    rand_augment: int = 0  # operations of RandAugment (Cubuk et al. 2020) on each image
    rand_augment_magnitude: int = 9  # of 30
    object_view: ObjectViewConfig = field(default_factory=ObjectViewConfig)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How captions become tokens; the tokenizer is kept in the workdir and in every checkpoint.

    kind 'clip': CLIP's BPE, which comes with clip_jax. 'bpe': one that is trained on the captions
    of the training sources at the first start. 'file': `path` is a Hugging Face `tokenizer.json`, a
    sentencepiece `.model`, a BERT `vocab.txt`, or a folder that holds one of them.
    """

    kind: Literal["clip", "bpe", "file"] = "clip"
    path: str = ""
    lowercase: bool = True


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """Several captions to a row, for causal text towers that pool at the end of text.

    Each `group_size` consecutive samples of the global batch share `rows` rows, so it divides the
    samples of a device in a microbatch. The embeddings are those of a caption to a row.
    """

    group_size: int = 0  # samples; 0: a caption to a row
    rows: int | None = None  # of a group; None: from captions measured at the first start


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How sources with access 'stream' are read; a run keeps to it."""

    num_streams: int = 16  # fixed for a run; hosts share them out, so a multiple of their number
    interleave: int = 4  # tars that a stream reads at a time
    window: int = 512  # samples that are shuffled among each other, at most 64 MiB of images


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads and how it becomes batches.

    framing, in training and evaluation: 'crop' is for photographs (random resized crop; centre
    crop). 'object' is for one thing on a transparent or white ground, as icons and products: the
    ground is trimmed off and the object set on white, whole.
    decode, of training images with framing 'crop': 'fast' decodes JPEGs at the least of 1, 1/2,
    1/4 and 1/8 that the crop needs and resamples linearly; 'exact' decodes whole and resamples
    nearly as Pillow's antialiased filter. Evaluation is always Pillow's, as the peers'.
    docs/data.md has the speeds and errors.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    repeat: bool = True  # False: a run that would see a sample twice is an error
    skipped_ranges: tuple[tuple[int, int], ...] = ()  # of samples [from, to), by place in the order
    framing: Literal["crop", "object"] = "crop"
    decode: Literal["fast", "exact"] = "fast"
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    on_bad_sample: Literal["skip", "fail"] = "skip"
    read_retries: int = 3  # of a read that fails for a reason that may pass
    num_workers: int = 0  # processes; 0: threads of the main process only
    num_threads: int = 2  # per process
    prefetch_batches: int = 2
    cache_dir: str | None = None  # tar indexes and built sets; None: $CLIP_JAX_CACHE or ~/.cache

    @property
    def streams(self) -> bool:
        """Whether the sources are read in sequence."""
        return any(source.access == "stream" for source in self.sources.values())


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The contrastive loss over the global batch; `clip_jax.objectives.contrastive_loss`."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    # Pairs with equal captions (token by token), or equal `image_id` where the batch has one:
    # each other's negatives (ignore), left out (exclude), or further positives (positive).
    duplicates: Literal["ignore", "exclude", "positive"] = "ignore"
    beta: float = 0.0  # concentration of hardness-weighted negatives; 0: all weigh one
    label_smoothing: float = 0.0  # softmax only
    product_dtype: Literal["float32", "bfloat16"] = "float32"  # summed in float32
    tile_size: int | None = None  # rows of logits held at a time; None: from the shapes
    bidirectional: bool = False  # text blocks travel both ways round the ring


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw"] = "adamw"
    learning_rate: float = 5e-4  # peak
    b1: float = 0.9
    b2: float = 0.98
    epsilon: float = 1e-6
    weight_decay: float = 0.2  # skips biases, norms, position and class embeddings, logit scale
    clip_global_norm: float | None = 1.0
    ema_decay: float | None = None  # of a moving average of the weights, for export; None: without


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    name: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 2000
    end_fraction: float = 0.0  # learning rate at the last step, as a share of the peak


@dataclass(frozen=True, kw_only=True)
class EvalSetConfig:
    """One set scored by retrieval and zero-shot classification of its captions.

    The first fields are those of a source.
    """

    kind: SourceKind = "webdataset"
    path: str = ""
    split: str = "test"
    image_key: str = ""
    caption_keys: tuple[str, ...] = ()
    description: str = ""
    templates: tuple[str, ...] = ("{}",)  # prompts; class embeddings are averaged over them
    zero_shot_ways: int = 100  # candidates in the zero-shot score; 0: no zero-shot score


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    sets: dict[str, EvalSetConfig] = field(default_factory=dict)
    every_steps: int = 0  # 0: only after the last step
    batch_size: int = 256  # global
    report: bool = True  # write report.html after the last evaluation


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 1000
    keep_latest: int = 2
    keep_every_steps: int | None = None  # these are never deleted
    asynchronous: bool = True


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    every_steps: int = 10
    tensorboard: bool = True
    wandb_project: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """All of a run. The resolved one is saved as `config.json` and is enough to rerun it."""

    name: str = "experiment"
    seed: int = 0
    num_steps: int = 100_000
    num_samples_seen: int | None = None  # sets num_steps where given: whole batches of it
    global_batch_size: int = 1024
    microbatches: int = 1  # the towers run on this many slices; the loss is over the whole batch
    mesh: tuple[int, int, int] = (-1, 1, 1)  # devices along data, fsdp, tensor; -1: the rest
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # of the towers' arithmetic
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass computes again
    model: ModelConfig = field(default_factory=ModelConfig)
    start: StartConfig = field(default_factory=StartConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


# On resume these may differ from the saved config (the difference is logged): they change where
# and how fast a run computes, not what.
MAY_CHANGE_ON_RESUME = (
    "mesh",
    "microbatches",
    "remat",
    "start.model",
    "start.image",
    "start.text",
    "loss.tile_size",
    "loss.bidirectional",
    "data.skipped_ranges",
    "data.read_retries",
    "data.num_workers",
    "data.num_threads",
    "data.prefetch_batches",
    "data.cache_dir",
    "evaluation",
    "checkpoint",
    "logging",
)
