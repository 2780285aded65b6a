"""Range and cross-field checks: each failure is one line with the numbers and the remedy."""

import math
from collections.abc import Callable
from typing import Any

from clip_jax.config.convert import flatten
from clip_jax.config.errors import ConfigError, nearest_multiples
from clip_jax.config.packing import check_packed_batch
from clip_jax.config.schema import ExperimentConfig
from clip_jax.config.validation_data import check_data
from clip_jax.config.validation_model import KINDS_WITH_HEADS, check_model
from clip_jax.config.validation_optimizer import check_optimizer

_POSITIVE = (
    "num_steps",
    "global_batch_size",
    "microbatches",
    "model.embed_dim",
    "model.logit_scale_init",
    "model.logit_scale_max",
    "model.image.image_size",
    "model.image.patch_size",
    "model.image.max_num_patches",
    "model.image.batch_norm_group_size",
    "model.image.layer_scale_init",
    "model.image.width",
    "model.image.depth",
    "model.image.num_heads",
    "model.image.mlp_ratio",
    "model.image.layer_norm_epsilon",
    "model.text.vocab_size",
    "model.text.context_length",
    "model.text.width",
    "model.text.depth",
    "model.text.num_heads",
    "model.text.mlp_ratio",
    "model.text.layer_norm_epsilon",
    "model.text.num_segments",
    "loss.tile_size",
    "data.num_threads",
    "data.prefetch_batches",
    "data.packing.rows",
    "data.stream.num_streams",
    "data.stream.interleave",
    "data.stream.window",
    "optimizer.learning_rate",
    "optimizer.epsilon",
    "optimizer.clip_global_norm",
    "evaluation.batch_size",
    "num_slices",
    "heartbeat_seconds",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
    "checkpoint.keep_latest",
    "checkpoint.keep_every_steps",
    "logging.every_steps",
    "logging.peak_tflops",
    "logging.upload_seconds",
)
_NOT_NEGATIVE = (
    "seed",
    "data.num_workers",
    "data.read_retries",
    "data.packing.group_size",
    "data.augment.rand_augment",
    "model.image.num_registers",
    "model.text.pad_id",
    "loss.beta",
    "optimizer.weight_decay",
    "schedule.warmup_steps",
    "evaluation.every_steps",
    "checkpoint.keep_best",
    "start.step",
)
_SHARES = ("schedule.end_fraction",)  # in [0, 1]
# In [0, 1): at 1 the bias correction divides by 0.
_DECAYS = ("optimizer.b1", "optimizer.b2", "optimizer.ema_decay", "model.image.patch_dropout")


def validate(config: ExperimentConfig, *, trains: bool = True) -> ExperimentConfig:
    """Checks all that does not depend on the devices. Returns `config`; raises ConfigError.

    trains: False where nothing is trained, so that there need be no source.
    """
    flat = flatten(config)
    for key, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"config.{key} must be finite, got {value}")
    _check_range(flat, _POSITIVE, lambda v: v > 0, "positive")
    _check_range(flat, _NOT_NEGATIVE, lambda v: v >= 0, "0 or more")
    _check_range(flat, _SHARES, lambda v: 0 <= v <= 1, "between 0 and 1")
    _check_range(flat, _DECAYS, lambda v: 0 <= v < 1, "0 or more and below 1")
    _check_range(flat, ("seed",), lambda v: v < 2**63, "below 2**63")
    check_model(config.model)
    _check_loss(config)
    if trains and not config.data.sources:
        raise ConfigError("config.data.sources is empty; add at least one source of pairs")
    _check_microbatches(config)
    check_data(config)
    check_optimizer(config)
    _check_start(config)
    _check_saving(config)
    if sum(size == -1 for size in config.mesh) > 1 or any(s < 1 and s != -1 for s in config.mesh):
        raise ConfigError(
            f"config.mesh must be positive sizes of (data, fsdp, tensor) with at most one -1, "
            f"got {config.mesh}"
        )
    if config.mesh[2] != -1:
        _check_heads(config, config.mesh)
    return config


def check_devices(config: ExperimentConfig, num_devices: int) -> tuple[int, int, int]:
    """The mesh for this many devices. Raises ConfigError where it or the batch does not fit."""
    fixed = math.prod(size for size in config.mesh if size != -1)
    if num_devices % fixed or (-1 not in config.mesh and fixed != num_devices):
        raise ConfigError(
            f"config.mesh {config.mesh} needs {'a multiple of ' if -1 in config.mesh else ''}"
            f"{fixed} devices, but there are {num_devices}"
        )
    sizes = [num_devices // fixed if size == -1 else size for size in config.mesh]
    data, fsdp, tensor = sizes
    _check_heads(config, (data, fsdp, tensor))
    shards = data * fsdp
    for name, batch, parts, spelled in (
        (
            "global_batch_size",
            config.global_batch_size,
            shards * config.microbatches,
            f"{shards} data-parallel devices x {config.microbatches} microbatches",
        ),
        (
            "evaluation.batch_size",
            config.evaluation.batch_size,
            shards,
            f"{shards} data-parallel devices",
        ),
    ):
        if batch % parts:
            raise ConfigError(
                f"config.{name} {batch} is not divisible by {spelled} = {parts}; nearest: "
                f"{nearest_multiples(batch, parts)}"
            )
    check_packed_batch(config, shards)
    return data, fsdp, tensor


def _check_range(
    flat: dict[str, Any], keys: tuple[str, ...], accepts: Callable[[Any], bool], spelled: str
) -> None:
    for key in keys:
        if flat[key] is not None and not accepts(flat[key]):
            raise ConfigError(f"config.{key} must be {spelled}, got {flat[key]}")


def _check_heads(config: ExperimentConfig, mesh: tuple[int, int, int]) -> None:
    for tower, kinds in KINDS_WITH_HEADS.items():
        settings, tensor = getattr(config.model, tower), mesh[2]
        if settings.kind in kinds and settings.num_heads % tensor:
            spelled = config.mesh if config.mesh == mesh else f"{config.mesh} = {mesh}"
            raise ConfigError(
                f"config.model.{tower}.num_heads {settings.num_heads} is not divisible by the "
                f"tensor axis {tensor} of config.mesh {spelled}"
            )


def _check_loss(config: ExperimentConfig) -> None:
    loss, bias = config.loss, config.model.logit_bias_init
    if not 0 <= loss.label_smoothing < 1:
        raise ConfigError(
            f"config.loss.label_smoothing must be 0 or more and below 1, got {loss.label_smoothing}"
        )
    if loss.kind == "sigmoid" and loss.label_smoothing:
        raise ConfigError(
            f"config.loss.label_smoothing {loss.label_smoothing} has no meaning for kind 'sigmoid'"
        )
    if loss.kind == "sigmoid" and bias is None:
        raise ConfigError(
            "config.loss.kind 'sigmoid' needs a bias: config.model.logit_bias_init=-10.0 and "
            "config.model.logit_scale_init=10.0 as in SigLIP"
        )
    if loss.kind == "softmax" and bias is not None:
        raise ConfigError(
            f"config.model.logit_bias_init {bias} is never learned under config.loss.kind "
            "'softmax', which is blind to it; leave it out"
        )


def _check_microbatches(config: ExperimentConfig) -> None:
    if config.microbatches > 1 and config.model.image.kind == "resnet":
        raise ConfigError(
            f"config.microbatches {config.microbatches} does not go with the batch norm of "
            "config.model.image.kind 'resnet': a microbatch has other statistics than the batch; "
            "use config.microbatches=1"
        )
    if config.global_batch_size % config.microbatches:
        raise ConfigError(
            f"config.global_batch_size {config.global_batch_size} is not divisible by microbatches "
            f"{config.microbatches}"
        )


def _check_start(config: ExperimentConfig) -> None:
    start = config.start
    for tower in start.lock:
        if all(folder is None for folder in (start.branch, start.model, getattr(start, tower))):
            raise ConfigError(
                f"config.start.lock {start.lock} would leave the {tower} tower at random: name its "
                f"weights with config.start.model or config.start.{tower}"
            )
    parts = [part for part in ("model", "image", "text") if getattr(start, part) is not None]
    if start.branch is not None and parts:
        raise ConfigError(
            f"config.start.branch {start.branch} brings all weights: leave out "
            f"config.start.{parts[0]}"
        )
    if start.step is not None and start.branch is None and not parts:
        raise ConfigError(
            f"config.start.step {start.step} is of a checkpoint to start from: name that with "
            "config.start.model, image, text or branch"
        )
    if start.branch is not None and start.use_ema:
        raise ConfigError(
            "config.start.use_ema is of start.model, image and text: start.branch goes on with the "
            "weights that the optimizer moves"
        )


def _check_saving(config: ExperimentConfig) -> None:
    checkpoint, evaluation, logging = config.checkpoint, config.evaluation, config.logging
    if bool(checkpoint.keep_best) != bool(checkpoint.best_metric):
        raise ConfigError(
            f"config.checkpoint.keep_best {checkpoint.keep_best} and best_metric "
            f"{checkpoint.best_metric!r} go together, as keep_best=1 and "
            "best_metric=eval/SET/text_to_image_R@1"
        )
    if checkpoint.keep_best:
        sets, parts = evaluation.sets, checkpoint.best_metric.split("/", maxsplit=2)
        if len(parts) < 3 or parts[0] != "eval" or parts[1] not in sets:
            raise ConfigError(
                f"config.checkpoint.best_metric {checkpoint.best_metric!r} is of no evaluation set "
                f"({', '.join(sets) or 'there is none'}); it is spelled eval/SET/METRIC"
            )
        if not evaluation.every_steps:
            raise ConfigError(
                "config.checkpoint.keep_best needs scores on the way: set "
                "config.evaluation.every_steps to a multiple of config.checkpoint.every_steps"
            )
    if evaluation.use_ema and config.optimizer.ema_decay is None:
        raise ConfigError(
            "config.evaluation.use_ema needs a moving average: set config.optimizer.ema_decay"
        )
    steps = logging.profile_steps
    if steps is not None and not 1 <= steps[0] <= steps[1]:
        raise ConfigError(
            f"config.logging.profile_steps must be (first, last), 1 <= first <= last, got {steps}"
        )
