"""Sets prepared by tensorflow_datasets as array_record files, read without TensorFlow."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.config.errors import UserError
from clip_jax.data.record import BadSampleError, Record
from clip_jax.data.sources.array_record import RecordFiles, RecordRange, example, image_of
from clip_jax.data.sources.caption_values import (
    Captions,
    captions_of_values,
    check_captions,
    class_captions,
    find_column,
)
from clip_jax.data.sources.files import is_remote, one_line

IMAGE_FEATURES = ("image", "jpg", "jpeg", "png", "webp", "picture")
CAPTION_FEATURES = (
    *("caption", "captions", "text", "captions.text", "caption.text", "captions.caption"),
    *("sentences.raw", "title", "description", "objects.caption"),
)
_LABEL = "label"
_RAGGED = "ragged_flat_values"  # under which lists of lists of different lengths are kept


class TfdsSource:
    """A split of a prepared set of tensorflow_datasets.

    name: `name`, `name/config` or `name:version`; split: also a part (`train[:1%]`) or a sum
    (`train+test`). data_dir: where sets are; None: $TFDS_DATA_DIR, or else tfds' own default.

    image_key: the feature of images; "": `image` or the first that holds images. caption_keys:
    features of texts, one or a sequence, nested ones with dots (`captions.text`); (): the first of
    `caption`, `captions`, `text`, `captions.text`, ... that is there. Without any, a class `label`
    makes the captions: `templates` filled with its name, underscores as blanks. caption_weights:
    see `captions_of_values`.

    The features' places come from `tfds.data_source`; the records are then read and parsed here,
    images left encoded: a worker needs neither tfds nor TensorFlow. Pickles to the files' names;
    threads may share it. Raises UserError for a set that is not prepared as array_record, features
    that are not there, and where the first records have no caption.
    """

    def __init__(
        self,
        name: str,
        *,
        split: str = "train",
        data_dir: str | None = None,
        image_key: str = "",
        caption_keys: Sequence[str] = (),
        caption_weights: Sequence[float] = (),
        templates: Sequence[str] = ("{}",),
        retries: int = 3,
    ) -> None:
        info = _prepared(name, split, data_dir or os.environ.get("TFDS_DATA_DIR"))
        ranges = [
            RecordRange(os.fspath(part.filename), part.skip, part.skip + part.take)
            for part in info.splits[split].file_instructions
        ]
        self._records = RecordFiles(ranges, retries)
        self._weights = tuple(caption_weights)
        self._templates = tuple(templates)
        images, texts, classes = _features(info.features)
        path = f"tfds set {name}"
        usual = (*IMAGE_FEATURES, *images)
        image = find_column(
            # Bytes of images may be kept as text; but not by chance.
            *(image_key, usual, [*images, *texts] if image_key else images),
            path=path,
            setting="image_key",
        )
        self._image = image.replace(".", "/")
        self._classes: list[str] | None = None  # names, where a label makes the captions
        if not caption_keys and not any(key in texts for key in CAPTION_FEATURES):
            self._classes = classes.get(_LABEL)
        keys = [_LABEL]
        if self._classes is None:
            keys = [
                find_column(key, CAPTION_FEATURES, list(texts), path=path, setting="caption_keys")
                for key in caption_keys or ("",)
            ]
        self._caption_keys = tuple(keys)
        self._captions_at = tuple(texts.get(key, key) for key in keys)
        check_captions(self, path)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        """Read one record. Raises IndexError and BadSampleError."""
        features = example(self._records[index], (self._image, *self._captions_at))
        captions, weights = self._captions(features)
        key = str(self._records.place(index)[1])
        return Record(image_of(features, self._image), captions, key, weights)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a record. Raises as reading it does."""
        return self._captions(example(self._records[index], self._captions_at))[0]

    def shard(self, index: int) -> str:
        """The file that holds a record."""
        return self._records.path(index)

    def locate(self, index: int) -> str:
        """A record's file and its position in it."""
        return f"{self._records.path(index)}, record {self._records.place(index)[1]}"

    def _captions(self, features: Mapping[str, list[bytes] | list[int]]) -> Captions:
        values = [features.get(name) for name in self._captions_at]
        if self._classes is None:
            return captions_of_values(values, self._caption_keys, self._weights)
        label = values[0][0] if values[0] else None
        if not isinstance(label, int) or not 0 <= label < len(self._classes):  # -1: not known
            raise BadSampleError(
                "caption", f"label {label!r} is none of {len(self._classes)} classes"
            )
        return class_captions(self._classes[label], self._templates), ()


def _prepared(name: str, split: str, data_dir: str | None) -> Any:
    """tfds' DatasetInfo of a set. Raises UserError where it or its split is not there."""
    import tensorflow_datasets as tfds

    folder = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
    build = f"tfds build {name} --file_format=array_record --data_dir={folder}"
    prepare = f"prepare it where TensorFlow is installed: {build}"
    if is_remote(folder):
        raise UserError(f"{folder}: tfds sets must be local; mount the bucket or copy the set")
    if not os.path.isdir(folder):
        raise UserError(f"no folder {folder} of tfds sets; set TFDS_DATA_DIR, or {prepare}")
    try:
        builder = tfds.builder(name, data_dir=folder)
        info = builder.info
        splits = list(info.splits)
    # Whatever tfds raises: an unknown name, a set's own code, a missing package.
    except Exception as error:
        raise UserError(
            f"tfds set '{name}' is not prepared in {folder} ({one_line(error)[:120]}); {prepare}"
        ) from error
    if not splits:
        raise UserError(f"tfds set '{name}' is not prepared in {folder}; {prepare}")
    try:
        num_records = info.splits[split].num_examples
    except (ValueError, LookupError) as error:
        raise UserError(
            f"tfds set '{name}' has no split '{split}' ({one_line(error)[:120]}); there are: "
            f"{', '.join(splits)}"
        ) from None
    try:
        source = tfds.data_source(name, split=split, data_dir=folder, download=False)
    except NotImplementedError:
        formats = ", ".join(sorted(form.value for form in info.available_file_formats()))
        raise UserError(
            f"tfds set '{name}' in {folder} is in format {formats}, which has no random access; "
            f"{prepare}"
        ) from None
    except ValueError as error:
        problem = one_line(error)[:120] if num_records else "is empty"
        raise UserError(f"tfds set '{name}': split '{split}' {problem}") from None
    info = source.dataset_info
    if info.file_format.value != "array_record":
        raise UserError(f"tfds set '{name}' is in format {info.file_format.value}; {prepare}")
    return info


def _features(
    features: Any, prefix: str = "", depth: int = 0
) -> tuple[list[str], dict[str, str], dict[str, list[str]]]:
    """Names, nested ones with dots: images; texts and where records keep them; classes.

    depth: of sequences around the features.
    """
    import tensorflow_datasets as tfds

    images: list[str] = []
    texts: dict[str, str] = {}
    classes: dict[str, list[str]] = {}
    for name, feature in features.items():
        key, inner_depth = f"{prefix}{name}", depth
        while isinstance(feature, tfds.features.Sequence):
            feature, inner_depth = feature.feature, inner_depth + 1
        if isinstance(feature, tfds.features.FeaturesDict):
            inner = _features(feature, f"{key}.", inner_depth)
            images, texts, classes = images + inner[0], texts | inner[1], classes | inner[2]
        elif isinstance(feature, tfds.features.Text):
            place = key.replace(".", "/")
            texts[key] = f"{place}/{_RAGGED}" if inner_depth > 1 else place
        elif isinstance(feature, tfds.features.ClassLabel) and inner_depth == 0:
            classes[key] = list(feature.names)
        elif isinstance(feature, tfds.features.Image) and inner_depth == 0:
            images.append(key)
    return images, texts, classes
