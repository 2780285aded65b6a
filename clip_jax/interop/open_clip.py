"""open_clip's directories: `open_clip_config.json`, weights, and a tokenizer that is not CLIP's.

`open_clip.create_model_and_transforms("local-dir:DIR")` runs what `write` writes. Config fields are
in `open_clip_reading` and `open_clip_writing`, names of tensors in `open_clip_tables`, tokenizers
in `open_clip_tokenizer`.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_jax.config import ModelConfig, UserError
from clip_jax.interop.checks import checked
from clip_jax.interop.huggingface_files import read_json, write_json
from clip_jax.interop.open_clip_fields import filled_in
from clip_jax.interop.open_clip_reading import read_config
from clip_jax.interop.open_clip_tables import BATCHES_TRACKED, IGNORED, batch_norms, is_timm, rows
from clip_jax.interop.open_clip_tokenizer import has_files, read_tokenizer, write_tokenizer
from clip_jax.interop.open_clip_trunks import write_bert
from clip_jax.interop.open_clip_writing import write_config
from clip_jax.interop.table import NdArray, read_table, write_table
from clip_jax.interop.tensors import read_tensors, write_safetensors
from clip_jax.interop.weights import PARTS, Weights, model_shapes

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
_FORMAT = "open_clip"  # our group in `Weights.extras`
# In open_clip's order; it takes the first that is there.
_NAMES = (
    WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def read(path: Path) -> Weights:
    """A model out of a directory, or out of a file of weights with a config beside it.

    Raises UserError in one line where a file is missing or damaged, a config field has a value of
    which clip_jax has nothing, or a tensor is missing, odd or without a place.
    """
    directory = path if path.is_dir() else path.parent
    if not (directory / CONFIG).is_file():
        beside = "" if path.is_dir() else f"; {path.name} needs it beside it"
        raise UserError(f"there is no {CONFIG} in {directory}{beside}")
    content = read_json(directory / CONFIG)
    cfg = filled_in("model_cfg", content.get("model_cfg"))
    text_cfg = filled_in("text_cfg", cfg["text_cfg"])
    tokenizer = read_tokenizer(directory, text_cfg)
    is_own_text = text_cfg["hf_model_name"] is None
    if is_own_text and tokenizer and tokenizer.vocab_size > text_cfg["vocab_size"]:
        raise UserError(
            f"{directory / CONFIG}: the tokenizer has {tokenizer.vocab_size} tokens, but "
            f"text_cfg.vocab_size is {text_cfg['vocab_size']}"
        )
    model = read_config(content, directory, tokenizer)
    tensors = read_tensors(_weights_file(directory) if path.is_dir() else path)
    counts = {name: tensors.pop(name) for name in [*tensors] if name.endswith(BATCHES_TRACKED)}
    custom_text = any(name.startswith("text.") for name in tensors)
    vector_scalars = tensors.get("logit_scale", np.zeros(())).ndim == 1
    table = rows(model, custom_text=custom_text, vector_scalars=vector_scalars)
    arrays = read_table(table, tensors, model_shapes(model), ignored=IGNORED)
    extras: dict[str, Any] = {"custom_text": custom_text, "vector_scalars": vector_scalars}
    if counts:
        extras[BATCHES_TRACKED] = _checked_counts(model, counts)
    for key in ("hf_model_name", "hf_tokenizer_name", "context_length"):
        if key in cfg["text_cfg"]:
            extras[key] = text_cfg[key]
    weights = Weights(model=model, arrays=arrays, tokenizer=tokenizer, extras={_FORMAT: extras})
    return checked(weights, str(directory / CONFIG))


def write(weights: Weights, directory: Path) -> None:
    """Config, weights and tokenizer files into an existing, empty directory.

    Raises UserError that names what the format has no place for, before anything is written.
    """
    model, extras = weights.model, weights.extras.get(_FORMAT, {})
    if weights.parts != PARTS:
        part = weights.parts[0]
        raise UserError(
            f"open_clip's format holds two towers, but these weights are of {part} alone"
        )
    layout = {
        "custom_text": extras.get("custom_text", _needs_custom_text(model)),
        "vector_scalars": extras.get("vector_scalars", False),
    }
    content = write_config(model, **layout)
    text_cfg = content["model_cfg"]["text_cfg"]
    if model.text.kind == "bert":
        name = extras.get("hf_model_name", ".")
        if name != "." and not Path(name).is_absolute():  # a name that others know
            text_cfg["hf_model_name"] = name
        text_cfg["context_length"] = extras.get("context_length", model.text.context_length)
    text_cfg |= write_tokenizer(
        weights.tokenizer, directory, model.text, name=extras.get("hf_tokenizer_name")
    )
    tensors = write_table(rows(model, **layout), weights.arrays)
    if model.image.kind == "resnet":
        counts = extras.get(BATCHES_TRACKED, {})
        for _, name in batch_norms(model.image):
            tensors[f"{name}.{BATCHES_TRACKED}"] = np.array(counts.get(name, 0), np.int64)
    write_safetensors(directory / WEIGHTS, tensors)
    if model.text.kind == "bert":
        write_json(directory / "config.json", write_bert(model.text)[1])
    write_json(directory / CONFIG, content)


def peer_embeddings(
    directory: Path, images: Sequence[Image.Image], texts: Sequence[str]
) -> dict[str, NdArray | None] | None:
    """What open_clip makes of pictures and texts with its own transforms and tokenizer.

    Unit-length float32 [B, E] as 'image' and 'text', the latter None where the directory has no
    tokenizer. None altogether where open_clip cannot be imported.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import open_clip  # type: ignore[import-not-found, import-untyped, unused-ignore]
            import torch
    except (ImportError, RuntimeError):  # torchvision of another torch raises the latter
        return None
    name = f"local-dir:{directory}"
    content = json.loads((directory / CONFIG).read_text("utf-8"))
    text_cfg = content["model_cfg"]["text_cfg"]
    has_tokenizer = not text_cfg.get("hf_tokenizer_name") or has_files(directory)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model, _, transform = open_clip.create_model_and_transforms(
            name, **_offline(directory, content["model_cfg"])
        )
        model.eval()
        pixels = torch.stack([transform(image) for image in images])
        embeddings = {"image": model.encode_image(pixels, normalize=True).numpy(), "text": None}
        if has_tokenizer:
            tokens = open_clip.get_tokenizer(name)(list(texts))
            embeddings["text"] = model.encode_text(tokens, normalize=True).numpy()
    return embeddings


def _offline(directory: Path, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that make open_clip read BERT's config from the directory, not from the hub."""
    if "hf_model_name" not in cfg["text_cfg"]:
        return {}
    here = {"hf_model_name": str(directory), "hf_model_pretrained": False}
    return {"text_cfg": {**cfg["text_cfg"], **here}}


def _weights_file(directory: Path) -> Path:
    """The file that open_clip would take, or the only one there is."""
    for name in _NAMES:
        if (directory / name).is_file():
            return directory / name
    files = sorted(file for file in directory.iterdir() if file.suffix in _SUFFIXES)
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{directory} should hold weights as {WEIGHTS}; found {found}")
    return files[0]


def _needs_custom_text(model: ModelConfig) -> bool:
    """Whether open_clip's own models of the kind are of its class CustomTextCLIP."""
    return model.text.kind == "bert" or is_timm(model.image)


def _checked_counts(model: ModelConfig, counts: Mapping[str, NdArray]) -> dict[str, int]:
    """Batches that each batch norm has seen, by open_clip's name of it; zeros are left out."""
    names = {name for _, name in batch_norms(model.image)} if model.image.resnet_layers else set()
    result = {}
    for name, count in counts.items():
        owner = name.removesuffix(f".{BATCHES_TRACKED}")
        if owner not in names or count.shape:
            raise UserError(f"the weights hold {name!r}, which the model has no place for")
        if int(count):
            result[owner] = int(count)
    return result
