"""Range and cross-field checks of what a run reads: sources, tokenizer, augmentation, packing."""

from clip_jax.config.convert import flatten
from clip_jax.config.errors import ConfigError
from clip_jax.config.packing import check_packed_batch, check_packing
from clip_jax.config.schema import AugmentConfig, ExperimentConfig, SourceConfig

# What `data.tokenizers.Tokenizer.train` makes: all bytes, padding, start and end of text.
_CLIP_VOCABULARY = (49408, 49407)  # size and end of text
_BPE_EOT_ID = 2
_BPE_MIN_VOCAB_SIZE = 256 + 3
_RAND_AUGMENT_LEVELS = 30


def check_data(config: ExperimentConfig) -> None:
    """Raises ConfigError for what does not fit in `config.data` and the evaluation sets."""
    for name, source in config.data.sources.items():
        _check_source(f"config.data.sources.{name}", source)
    _check_streams(config)
    _check_places(config)
    _check_packing(config)
    _check_tokenizer(config)
    _check_augment(config.data.augment)
    for name, eval_set in config.evaluation.sets.items():
        if not eval_set.path:
            raise ConfigError(f"config.evaluation.sets.{name}.path is empty")
        if eval_set.zero_shot_ways < 0 or eval_set.zero_shot_ways == 1:
            raise ConfigError(
                f"config.evaluation.sets.{name}.zero_shot_ways must be 2 or more, or 0 for no "
                f"zero-shot score, got {eval_set.zero_shot_ways}"
            )
        if not eval_set.templates or any("{}" not in t for t in eval_set.templates):
            raise ConfigError(
                f"config.evaluation.sets.{name}.templates must be prompts that contain {{}}, "
                f"got {eval_set.templates}"
            )


def _check_source(key: str, source: SourceConfig) -> None:
    if not source.path:
        raise ConfigError(f"{key}.path is empty")
    if source.first_caption is not None and not 0 <= source.first_caption <= 1:
        raise ConfigError(
            f"{key}.first_caption must be between 0 and 1, got {source.first_caption}"
        )
    if source.weight <= 0:
        raise ConfigError(f"{key}.weight must be positive, got {source.weight}")
    keys, weights = source.caption_keys, source.caption_weights
    if weights and len(weights) != len(keys):
        raise ConfigError(
            f"{key}.caption_weights has {len(weights)} entries and caption_keys {len(keys)}: "
            "one probability for each key"
        )
    if weights and (min(weights) < 0 or sum(weights) == 0):
        raise ConfigError(f"{key}.caption_weights must be 0 or more, not all 0, got {weights}")
    if not source.templates or any("{}" not in template for template in source.templates):
        raise ConfigError(
            f"{key}.templates must be prompts that contain {{}}, got {source.templates}"
        )
    if source.access == "stream" and source.kind != "webdataset":
        raise ConfigError(
            f"{key}.access 'stream' is for tars; kind '{source.kind}' needs access=random"
        )


def _check_streams(config: ExperimentConfig) -> None:
    data, batch = config.data, config.global_batch_size
    if not data.streams:
        return
    random = [name for name, source in data.sources.items() if source.access == "random"]
    if random:
        raise ConfigError(
            f"config.data.sources.{random[0]}.access is 'random' and others stream: a run reads "
            "all its sources in one way"
        )
    if not data.repeat:
        raise ConfigError(
            "config.data.repeat=False needs sources with access 'random': how many samples a "
            "stream holds is known when it ends"
        )
    streams = data.stream.num_streams
    if batch % streams:
        below = next(count for count in range(streams, 0, -1) if batch % count == 0)
        raise ConfigError(
            f"config.data.stream.num_streams {streams} does not divide global_batch_size {batch}; "
            f"the next below that does is {below}"
        )


def _check_places(config: ExperimentConfig) -> None:
    for first, end in config.data.skipped_ranges:
        if not 0 <= first < end:
            raise ConfigError(
                f"config.data.skipped_ranges must be (from, to) with 0 <= from < to, got "
                f"({first}, {end})"
            )
    magnitude = config.data.augment.rand_augment_magnitude
    if not 0 <= magnitude <= _RAND_AUGMENT_LEVELS:
        raise ConfigError(
            f"config.data.augment.rand_augment_magnitude must be between 0 and "
            f"{_RAND_AUGMENT_LEVELS}, got {magnitude}"
        )


def _check_packing(config: ExperimentConfig) -> None:
    group, rows = config.data.packing.group_size, config.data.packing.rows
    if group is None and rows is not None:
        raise ConfigError(
            f"config.data.packing.rows {rows} is of a group whose size is not given; set "
            "config.data.packing.group_size too, or neither"
        )
    if not group:
        return
    check_packing(config.model.text)
    check_packed_batch(config)
    if rows is not None and rows > group:
        raise ConfigError(
            f"config.data.packing.rows {rows} is more than group_size {group}, a row a caption"
        )


def _check_tokenizer(config: ExperimentConfig) -> None:
    tokenizer, text = config.data.tokenizer, config.model.text
    if tokenizer.kind == "file":
        if not tokenizer.path:
            raise ConfigError("config.data.tokenizer.path is empty; name a tokenizer.json")
        return
    if tokenizer.kind == "clip":
        size, eot_id = _CLIP_VOCABULARY
        if text.vocab_size < size or text.eot_id != eot_id:
            raise ConfigError(
                f"config.data.tokenizer.kind 'clip' has {size} tokens and end of text {eot_id}; "
                f"config.model.text has vocab_size {text.vocab_size} and eot_id "
                f"{text.eot_id}; use kind=bpe to train one on the captions, or kind=file"
            )
        return
    own = "config.data.tokenizer.kind=file and path=tokenizer.json for a tokenizer you have"
    if text.eot_id != _BPE_EOT_ID:
        raise ConfigError(
            f"config.data.tokenizer.kind 'bpe' trains a tokenizer whose end of text is token "
            f"{_BPE_EOT_ID}, but config.model.text.eot_id is {text.eot_id}; set "
            f"config.model.text.eot_id={_BPE_EOT_ID}, or {own}"
        )
    if text.vocab_size < _BPE_MIN_VOCAB_SIZE:
        raise ConfigError(
            f"config.data.tokenizer.kind 'bpe' needs config.model.text.vocab_size "
            f"{_BPE_MIN_VOCAB_SIZE} or more (256 bytes and 3 special tokens), got "
            f"{text.vocab_size}; raise it, or set {own}"
        )


def _check_augment(augment: AugmentConfig) -> None:
    """Ranges are 0 < low <= high, probabilities at most 1, nothing is negative."""
    probabilities = ("horizontal_flip", "color_jitter", "grayscale")
    object_probabilities = ("rotation", "color", "grayscale", "pale")
    limited = {*probabilities, *(f"object_view.{name}" for name in object_probabilities)}
    for name, value in flatten(augment).items():
        key = f"config.data.augment.{name}"
        if isinstance(value, tuple) and not 0 < value[0] <= value[1]:
            if name != "object_view.saturation" or not 0 <= value[0] <= value[1]:
                raise ConfigError(f"{key} must be (low, high) with 0 < low <= high, got {value}")
        elif isinstance(value, float) and value < 0:
            raise ConfigError(f"{key} must be 0 or more, got {value}")
        elif name in limited and value > 1:
            raise ConfigError(f"{key} is a probability, at most 1, got {value}")
    if augment.object_view.scale[1] > 1 or augment.crop_scale[1] > 1:
        raise ConfigError(
            "config.data.augment.crop_scale and object_view.scale are shares, at most 1, got "
            f"{augment.crop_scale} and {augment.object_view.scale}"
        )
