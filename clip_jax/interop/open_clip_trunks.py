"""The towers that open_clip takes from other libraries by name: timm's SigLIP ViTs, and BERT."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clip_jax.config import ImageTowerConfig, TextTowerConfig, UserError
from clip_jax.config.schema import Activation
from clip_jax.interop.huggingface_files import read_json

TRUNK_EPSILON = 1e-6  # of timm's layer norms


class Trunk(NamedTuple):
    """What a name of timm's stands for."""

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    patch_size: int
    image_size: int
    activation: Activation


_SIZES = {  # width, depth, heads, MLP width
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
# timm 1.0, models/vision_transformer.py. It has no names for SigLIP 2's other sizes: the first
# SigLIP's, with the exact GELU, stand for both there.
_EXACT = (
    *(("base", 16, size) for size in (224, 256, 384, 512)),
    *(("large", 16, size) for size in (256, 384)),
    *(("so400m", 14, size) for size in (224, 378)),
)
_TANH = (
    ("base", 32, 256),
    ("large", 16, 512),
    *(("so400m", 16, size) for size in (256, 384, 512)),
    *(("giantopt", 16, size) for size in (256, 384)),
)
_ACTIVATIONS: dict[Activation, Sequence[tuple[str, int, int]]] = {
    "gelu": _EXACT,
    "gelu_tanh": _TANH,
}
TRUNKS: dict[str, Trunk] = {
    f"vit_{name}_patch{patch}_siglip_{size}": Trunk(*_SIZES[name], patch, size, activation)
    for activation, names in _ACTIVATIONS.items()
    for name, patch, size in names
}


def trunk_named(name: str) -> Trunk:
    """The trunk of `vision_cfg.timm_model_name`, with or without timm's tag of weights."""
    found = TRUNKS.get(name.partition(".")[0])
    if found is None:
        raise UserError(
            f"vision_cfg.timm_model_name {name!r} is no trunk that clip_jax has; it has the SigLIP "
            f"ViTs {', '.join(sorted(TRUNKS))}"
        )
    return found


def name_of_trunk(image: ImageTowerConfig) -> str:
    """The name in timm of a SigLIP tower. Raises UserError with what the nearest one differs in."""
    wanted = Trunk(
        image.width,
        image.depth,
        image.num_heads,
        round(image.width * image.mlp_ratio),
        image.patch_size,
        image.image_size,
        image.activation,
    )
    differences = {
        name: [field for field in Trunk._fields if getattr(trunk, field) != getattr(wanted, field)]
        for name, trunk in TRUNKS.items()
    }
    name = min(differences, key=lambda name: len(differences[name]))
    if differences[name]:
        spelled = ", ".join(
            f"{field} {getattr(wanted, field)!r} (there {getattr(TRUNKS[name], field)!r})"
            for field in differences[name]
        )
        raise UserError(
            f"open_clip has no SigLIP image tower of this shape: the nearest, timm's {name}, "
            f"differs in model.image.{spelled}"
        )
    return name


# ---- BERT ------------------------------------------------------------------------------------

_BERT_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
_BASE, _LARGE = (768, 12, 12, 3072), (1024, 24, 16, 4096)
# Vocabulary and size of the published ones (Devlin et al. 2019); else they are alike.
_PUBLISHED_BERTS = {
    "bert-base-uncased": (30522, *_BASE),
    "bert-large-uncased": (30522, *_LARGE),
    "bert-base-cased": (28996, *_BASE),
    "bert-large-cased": (28996, *_LARGE),
    "bert-base-chinese": (21128, *_BASE),
    "bert-base-multilingual-uncased": (105879, *_BASE),
    "bert-base-multilingual-cased": (119547, *_BASE),
}
_BERT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "is_decoder": False,
}


def read_bert(directory: Path, name: str) -> dict[str, Any]:
    """Fields of the text tower's config for `text_cfg.hf_model_name`.

    They come from the `config.json` of the directory, or of the directory that `name` is, or are
    those of a published BERT. Raises UserError where it is none, or not a BERT.
    """
    for folder in (directory, Path(name)):
        path = folder / "config.json"
        if path.is_file():
            return _bert_fields(path, read_json(path))
    published = _PUBLISHED_BERTS.get(name.removeprefix("google-bert/"))
    if published is None:
        raise UserError(
            f"text_cfg.hf_model_name {name!r} is no BERT that clip_jax knows: put its config.json "
            f"into {directory} (known: {', '.join(_PUBLISHED_BERTS)})"
        )
    keys = tuple(_BERT_DEFAULTS)[:5]
    return _bert_fields(
        Path(name), {"model_type": "bert", **dict(zip(keys, published, strict=True))}
    )


def write_bert(text: TextTowerConfig) -> tuple[str, dict[str, Any]]:
    """`hf_model_name`, and the content of the `config.json` beside it.

    The name is '.' for a BERT of no published size: run open_clip from within the directory then,
    it looks for such a name in the working directory.
    """
    mlp_width = round(text.width * text.mlp_ratio)
    shape = (text.vocab_size, text.width, text.depth, text.num_heads, mlp_width)
    activations = {ours: theirs for theirs, ours in reversed(_BERT_ACTIVATIONS.items())}
    values = dict(zip(tuple(_BERT_DEFAULTS)[:5], shape, strict=True)) | {
        "hidden_act": activations[text.activation],
        "max_position_embeddings": text.context_length,
        "type_vocab_size": text.num_segments,
        "layer_norm_eps": text.layer_norm_epsilon,
        "pad_token_id": text.pad_id,
    }
    alike = all(_BERT_DEFAULTS[key] == values[key] for key in tuple(values)[5:])
    names = [name for name, published in _PUBLISHED_BERTS.items() if published == shape and alike]
    config = {"model_type": "bert", "architectures": ["BertModel"], **values}
    return (names or ["."])[0], config


def _bert_fields(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    if content.get("model_type") != "bert":
        raise UserError(
            f"{path}: model_type {content.get('model_type')!r} is no text tower that clip_jax has; "
            "it has 'bert'"
        )
    values = _BERT_DEFAULTS | {key: content[key] for key in _BERT_DEFAULTS if key in content}
    for key, default in _BERT_DEFAULTS.items():
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(values[key], kinds):
            raise UserError(
                f"{path}: {key} {values[key]!r} is not of type {type(default).__name__}"
            )
    for key in ("position_embedding_type", "is_decoder"):
        if values[key] != _BERT_DEFAULTS[key]:
            raise UserError(f"{path}: {key} {values[key]!r} is not supported")
    if values["hidden_act"] not in _BERT_ACTIVATIONS:
        raise UserError(
            f"{path}: hidden_act {values['hidden_act']!r} is unknown; known: "
            f"{', '.join(_BERT_ACTIVATIONS)}"
        )
    return {
        "kind": "bert",
        "causal": False,
        "vocab_size": values["vocab_size"],
        "context_length": values["max_position_embeddings"],
        "pad_id": values["pad_token_id"],
        "num_segments": values["type_vocab_size"],
        "width": values["hidden_size"],
        "depth": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "mlp_ratio": values["intermediate_size"] / values["hidden_size"],
        "activation": _BERT_ACTIVATIONS[values["hidden_act"]],
        "layer_norm_epsilon": values["layer_norm_eps"],
    }
