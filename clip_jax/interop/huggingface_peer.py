"""Embeddings by transformers itself, for the parity gate."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Embeddings = dict[str, NDArray[np.float32] | None]
_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


def peer_embeddings(
    directory: Path, images: Sequence[Image.Image], texts: Sequence[str]
) -> Embeddings | None:
    """Unit-length float32 [B, E] of 'image' and 'text', by transformers' AutoModel on the CPU.

    Images and texts go through the directory's own preprocessor and tokenizer; None stands for
    those of which it has none. None where transformers or torch cannot be imported.
    """
    try:
        import torch
        import transformers
        import transformers.modeling_utils  # imports torchvision too, if there is one
    except (ImportError, RuntimeError):  # a torchvision of another torch raises the latter
        return None
    with _quiet(), torch.inference_mode():
        model, loading = transformers.AutoModel.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        model = _Towers(
            model.eval(), has_pooler="pooler.dense.weight" not in loading["missing_keys"]
        )
        return {
            "image": _unit(_image_features(transformers, model, directory, images)),
            "text": _unit(_text_features(transformers, model, directory, texts)),
        }


class _Towers:
    """A model of two towers, or of one, with the same methods."""

    def __init__(self, model: Any, *, has_pooler: bool) -> None:
        self._model, self._has_pooler = model, has_pooler
        self.config = model.config
        self._is_single = not hasattr(model, "get_text_features")

    def images(self, inputs: Mapping[str, Any]) -> Any:
        if not self._is_single:
            return self._model.get_image_features(**inputs)
        output = self._model(**inputs)
        # The pooler of a ViT is for its pretraining: what follows it is the class token.
        return output.last_hidden_state[:, 0] if self.config.model_type == "vit" else output

    def texts(self, inputs: Mapping[str, Any]) -> Any:
        if self._is_single:
            output = self._model(**inputs)
            return output if self._has_pooler else output.last_hidden_state[:, 0]
        if self.config.model_type.startswith("siglip"):
            # Trained without a mask of padding, which a tokenizer may give all the same.
            inputs = {"input_ids": inputs["input_ids"]}
        return self._model.get_text_features(**inputs)

    @property
    def context_length(self) -> int:
        config = self.config if self._is_single else self.config.text_config
        return int(config.max_position_embeddings)


def _image_features(
    transformers: Any, model: _Towers, directory: Path, images: Sequence[Image.Image]
) -> Any:
    if not images or not _has_any(directory, _PREPROCESSORS):
        return None
    # PIL's resampling, as clip_jax and open_clip: torchvision's differs by grey levels.
    processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    inputs = processor(images=list(images), return_tensors="pt")
    return model.images(inputs)


def _text_features(transformers: Any, model: _Towers, directory: Path, texts: Sequence[str]) -> Any:
    if not texts or not _has_any(directory, ("tokenizer_config.json", "tokenizer.json")):
        return None
    # AutoProcessor, for it is what users call: it must find both of its parts.
    if _has_any(directory, _PREPROCESSORS):
        tokenizer = transformers.AutoProcessor.from_pretrained(directory).tokenizer
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=model.context_length,
        return_tensors="pt",
    )
    return model.texts(inputs)


def _has_any(directory: Path, names: Sequence[str]) -> bool:
    return any((directory / name).is_file() for name in names)


def _unit(features: Any) -> NDArray[np.float32] | None:
    if features is None:
        return None
    # transformers 5 returns the tower's whole output, 4 the projected embedding.
    pooled = getattr(features, "pooler_output", features)
    return (pooled / pooled.norm(dim=-1, keepdim=True)).numpy()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' advice and progress bars."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
