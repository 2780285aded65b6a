"""The config of how a run trains: loss, optimizer, schedule, checkpoints, logging."""

from dataclasses import dataclass, field
from typing import Literal

from clip_jax.config.schema_data import SourceKind


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """Weights that a run starts from, each the workdir of a run or of `clip-jax import`.

    `model` also brings its architecture, tokenizer, preprocessing and kind of loss in place of the
    recipe's; `image` and `text` bring those of one tower. Settings on the command line come after
    them: learned position embeddings are resampled to another `image_size`. With `weights_only`
    the checkpoints bring weights and nothing else: a recipe for another size says so itself.
    """

    model: str | None = None  # both towers, projections, scale and bias
    image: str | None = None  # the image tower alone
    text: str | None = None  # the text tower alone
    # Or all of a run: weights, optimizer, step and place in the data, to go on under another config
    # in a workdir of its own, as for a cooldown of 'wsd'.
    branch: str | None = None
    step: int | None = None  # which checkpoint of theirs; None: the latest
    use_ema: bool = False  # of model, image and text: the moving average of the weights
    weights_only: bool = False  # architecture, tokenizer, framing, loss: those of the recipe
    lock: tuple[Literal["image", "text"], ...] = ()  # towers left as they are (Zhai et al. 2022)


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
class TowerRateConfig:
    """How fast one tower learns, relative to `optimizer.learning_rate`."""

    multiplier: float = 1.0  # of the whole tower, its projection included
    layer_decay: float = 1.0  # factor for each block nearer to the input (Bao et al. 2022, BEiT)
    frozen_layers: int = 0  # so many blocks from the input stay as they are, the embeddings too


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule. docs/optimizers.md has the formulas, defaults and sources of each.

    name 'adamw' (Loshchilov & Hutter 2019), 'lion' (Chen et al. 2023), 'adafactor' (big_vision's
    variant, Zhai et al. 2022), 'sgd' with momentum `b1`, 'muon' (Jordan et al. 2024) for matrices
    of the blocks with AdamW for all else. Fields that a rule does not have are ignored.
    """

    name: Literal["adamw", "lion", "adafactor", "sgd", "muon"] = "adamw"
    learning_rate: float = 5e-4  # peak
    b1: float = 0.9  # of the first moment; sgd's and muon's momentum
    b2: float = 0.98  # of the second moment; lion's of its momentum; adafactor's highest
    epsilon: float = 1e-6
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    weight_decay: float = 0.2
    # Parameters that weight decay leaves alone: regular expressions that match the end of a path.
    no_decay: tuple[str, ...] = (
        "bias",
        "scale",
        "(position|segment|class|register)_embedding",
        "probe",
        "log_logit_scale",
    )
    frozen: tuple[str, ...] = ()  # regular expressions of whole paths that stay as they are
    image: TowerRateConfig = field(default_factory=TowerRateConfig)
    text: TowerRateConfig = field(default_factory=TowerRateConfig)
    clip_global_norm: float | None = 1.0
    ema_decay: float | None = None  # of a moving average of the weights; None: without


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate by step: linear warmup, then `name`, as shares of the peak.

    'cosine' and 'linear' fall to `end_fraction` at the last step; 'constant' stays. 'rsqrt' falls
    with the inverse square root of the steps, 'wsd' stays (Hu et al. 2024); both end with a
    cooldown to `end_fraction`. Lengths are given in steps, samples or epochs, in one unit each.
    """

    name: Literal["cosine", "linear", "constant", "rsqrt", "wsd"] = "cosine"
    warmup_steps: int = 2000
    warmup_samples: int | None = None  # sets warmup_steps where given, as does the next
    warmup_epochs: float | None = None
    cooldown_steps: int = 0  # of 'rsqrt' and 'wsd', at the end of the run
    cooldown_samples: int | None = None
    cooldown_epochs: float | None = None
    cooldown_shape: Literal["linear", "sqrt"] = "linear"  # sqrt: 1 - sqrt, Haegele et al. 2024
    timescale_steps: int = 10_000  # of 'rsqrt'
    end_fraction: float = 0.0  # learning rate at the last step, as a share of the peak


@dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """What a run does when its numbers go wrong.

    A loss or gradient that is not finite always leaves weights and optimizer as they were.
    """

    max_skipped_steps: int = 20  # updates left out in a row before the run ends with an error
    # Loss this many robust standard deviations above the median of `spike_window` steps: the run
    # goes back to its last checkpoint and on without the samples of `spike_steps` steps up to the
    # spike, which quarantine.jsonl lists. None: never.
    spike_zscore: float | None = None
    spike_window: int = 128
    spike_steps: int = 1
    max_rewinds: int = 10  # of a run, before it ends with an error


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
    use_ema: bool = False  # score the moving average of the weights
    report: bool = True  # write report.html after the last evaluation


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved, beside its last step and when it is told to stop, and what is kept."""

    every_steps: int = 1000
    every_minutes: float | None = None  # since the last save; None: by steps alone
    keep_latest: int = 2
    keep_every_steps: int | None = None  # these are never deleted
    keep_best: int = 0  # and so many with the highest `best_metric` of those scored
    best_metric: str = ""  # as in metrics.jsonl: eval/SET/text_to_image_R@1
    asynchronous: bool = True
    verify: bool = True  # checksums of what is restored


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    every_steps: int = 10
    tensorboard: bool = True
    wandb_project: str | None = None
    layer_norms: bool = False  # of parameters, gradients and updates, layer by layer
    profile_steps: tuple[int, int] | None = None  # first and last of a trace, in WORKDIR/profile
    peak_tflops: float | None = None  # of a chip, for MFU; None: its data sheet's
    measure_peak: bool = False  # time a matrix product at the start: MFU against that as well
    upload_seconds: float = 60.0  # between parts of metrics where the workdir is a bucket
