"""The config of what a run reads, and how it becomes batches."""

from dataclasses import dataclass, field
from typing import Literal

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
    samples of a device in a microbatch. The embeddings are those of a caption to a row. A run
    chooses what is None at its first start, from captions that it measures, and keeps it.
    """

    # Samples; 0: a caption to a row. None: 64 or the largest that divides, where packing is exact
    # and saves rows, else 0.
    group_size: int | None = None
    rows: int | None = None  # of a group


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
