"""big_vision's two-tower checkpoints: SigLIP, SigLIP 2 with NaFlex, LiT, as `.npz` archives.

Names are `params/img/...`, `params/txt/...`, `params/t` (logarithm of the logit scale) and
`params/b` (logit bias, where the loss is the sigmoid one), as released. Arrays tell the
architecture; what they do not tell is taken as all of the family have it (see
`big_vision_towers`), texts pooled at the last token unless there is an attention pooling. Images
are squashed to the model's size, bicubic as open_clip and transformers do for SigLIP (big_vision
itself: TensorFlow's bilinear), for NaFlex bilinear.

Beside the archive may lie a tokenizer, which the archive does not hold, and our `preprocess.json`,
for what the family has in several ways. big_vision is no package, so that no peer runs what is
written here; the tests do, with transformers' SigLIP on the same numbers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_jax.config import ImageTowerConfig, ModelConfig, TextTowerConfig, UserError
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.interop.big_vision_towers import (
    TRANSFORMER,
    VIT,
    Tensors,
    archive_settings,
    current_names,
    dense_rows,
    encoder_settings,
    group,
    image_rows,
    is_scanned,
    params_of,
    shape_of,
    text_rows,
    without_class_position,
)
from clip_jax.interop.checks import checked
from clip_jax.interop.huggingface_files import Fields, read_json, write_json
from clip_jax.interop.huggingface_towers import require
from clip_jax.interop.table import Row, read_table, same, write_table
from clip_jax.interop.tensors import read_tensors
from clip_jax.interop.weights import PARTS, Weights, model_shapes

ARCHIVE = "model.npz"
SETTINGS = "preprocess.json"
_TOKENIZERS = ("tokenizer.json", "spiece.model", "tokenizer.model", "sentencepiece.model")
_GEMMA_VOCABULARY = 256_000  # of SigLIP 2, padded with 0; SigLIP's are padded with their end
_END = 1  # of a text, in all of the family's vocabularies
# big_vision sets no limit, and 117 is usual for SigLIP. With a softmax loss: LiT.
_SIGMOID = {"logit_scale_init": 10.0, "logit_bias_init": -10.0, "logit_scale_max": 1000.0}
_SOFTMAX = {"logit_scale_init": 10.0, "logit_bias_init": None, "logit_scale_max": 1000.0}
_TARGET = "a big_vision checkpoint"


def read(path: Path) -> Weights:
    """The model in an archive, or in the one archive of a directory; of one tower too.

    Raises UserError, in one line, for whatever is odd about it.
    """
    file = _archive(Path(path))
    tensors = params_of(read_tensors(file))
    if not any(name.startswith(("img/", "txt/")) for name in tensors):
        from clip_jax.interop import single_tower

        return single_tower.read_npz(file)
    where = str(file)
    img, txt = current_names(group(tensors, "img")), _with_one_position(group(tensors, "txt"))
    rest = {name: tensors[name] for name in tensors if not name.startswith(("img/", "txt/"))}
    if "t" not in rest:
        raise UserError(f"{where} lacks 't', the logarithm of the logit scale")
    tokenizer = _tokenizer(file.parent)
    settings = archive_settings(img, where) | _preprocessing(file.parent)
    text = _text_settings(txt, tokenizer, where)
    embed_dims = [
        shape_of(tower, "head/kernel", where)[-1] if "head/kernel" in tower else width
        for tower, width in ((img, settings["width"]), (txt, text["width"]))
    ]
    if embed_dims[0] != embed_dims[1]:
        raise UserError(
            f"{where}: image embeddings have {embed_dims[0]} numbers and text embeddings "
            f"{embed_dims[1]}"
        )
    model = ModelConfig(
        image=ImageTowerConfig(**settings),
        text=TextTowerConfig(**text),
        embed_dim=embed_dims[0],
        image_projection="linear_bias" if "head/kernel" in img else "none",
        text_projection="linear_bias" if "head/kernel" in txt else "none",
        **(_SIGMOID if "b" in rest else _SOFTMAX),
    )
    scanned = [
        name
        for name, tower, encoder in (("img", img, "Transformer"), ("txt", txt, "Encoder_0"))
        if is_scanned(tower, encoder)
    ]
    named = rest | {f"img/{name}": tensor for name, tensor in img.items()}
    named |= {f"txt/{name}": tensor for name, tensor in txt.items()}
    arrays = read_table(_rows(model, scanned), named, model_shapes(model))
    extras: dict[str, Any] = {"big_vision": {"scanned": scanned}} if scanned else {}
    return checked(Weights(model=model, arrays=arrays, tokenizer=tokenizer, extras=extras), where)


def write(weights: Weights, directory: Path) -> None:
    """The archive, its settings and the tokenizer into an existing empty directory.

    Layers are named one by one, as released for SigLIP, or stacked where the weights came so.
    Raises UserError that names what big_vision's towers do not have.
    """
    if weights.parts != PARTS:
        raise UserError(
            f"{_TARGET} holds two towers, and these weights are of the {weights.parts[0]} tower"
        )
    model = weights.model
    _require_towers(model)
    scanned = weights.extras.get("big_vision", {}).get("scanned", [])
    tensors = write_table(_rows(model, scanned), weights.arrays)
    tensors = without_class_position(tensors, "img")
    preprocessing: dict[str, Any] = {"interpolation": model.image.interpolation}
    if model.image.kind == "naflex":
        preprocessing["max_num_patches"] = model.image.max_num_patches
    write_json(directory / SETTINGS, preprocessing)
    if weights.tokenizer is not None:
        weights.tokenizer.save(directory / "tokenizer.json")
        if weights.tokenizer.sentencepiece_model is not None:  # what big_vision itself reads
            (directory / "tokenizer.model").write_bytes(weights.tokenizer.sentencepiece_model)
    content: dict[str, Any] = {f"params/{name}": tensors[name] for name in sorted(tensors)}
    np.savez(directory / ARCHIVE, **content)


def peer_embeddings(
    directory: Path, images: Sequence[Image.Image], texts: Sequence[str]
) -> dict[str, Any] | None:
    """None: big_vision is no package that can be installed, and the check of itself has to do."""
    del directory, images, texts
    return None


def _archive(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.npz"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files[:3]) or "none"
        raise UserError(f"{path} must hold one .npz archive (found: {found}); name the file itself")
    return files[0]


def _with_one_position(txt: Tensors) -> dict[str, Any]:
    """Early checkpoints add positions twice, in the tower and in its encoder: their sum."""
    tensors: dict[str, Any] = dict(txt)
    more = tensors.pop("Encoder_0/pos_embedding", None)
    if more is not None and "pos_embedding" in tensors:
        tensors["pos_embedding"] = np.add(tensors["pos_embedding"], more)
    return tensors


def _text_settings(txt: Tensors, tokenizer: Tokenizer | None, where: str) -> dict[str, Any]:
    vocab_size = shape_of(txt, "Embed_0/embedding", where)[0]
    pad_id = 0 if vocab_size == _GEMMA_VOCABULARY else _END
    if tokenizer is not None:
        pad_id = tokenizer.pad_id
    return {
        **TRANSFORMER,
        **encoder_settings(txt, "Encoder_0", where),
        "causal": False,
        "vocab_size": vocab_size,
        "context_length": shape_of(txt, "pos_embedding", where)[-2],
        "eot_id": _END if tokenizer is None else tokenizer.eot_id,
        "pad_id": pad_id,
        "pooling": "attention" if "MAPHead_0/probe" in txt else "last",
    }


def _preprocessing(directory: Path) -> dict[str, Any]:
    """What our own exports say beside the archive."""
    file = directory / SETTINGS
    if not file.is_file():
        return {}
    fields = Fields(read_json(file), {}, str(file))
    settings: dict[str, Any] = {}
    if "interpolation" in fields:
        settings["interpolation"] = fields.text("interpolation")
        if settings["interpolation"] not in ("bicubic", "bilinear"):
            raise UserError(
                f"{file}: interpolation must be bicubic or bilinear, got "
                f"{settings['interpolation']!r}"
            )
    if "max_num_patches" in fields:
        settings["max_num_patches"] = fields.positive("max_num_patches")
    return settings


def _tokenizer(directory: Path) -> Tokenizer | None:
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        return None
    return Tokenizer.load(directory)


def _rows(model: ModelConfig, scanned: Sequence[str]) -> list[Row]:
    rows = [
        *image_rows(model.image, "img/", scanned="img" in scanned),
        *text_rows(
            "txt/",
            pooling=model.text.pooling,
            context_length=model.text.context_length,
            scanned="txt" in scanned,
        ),
        same("log_logit_scale", "t", shape=(1,)),
    ]
    if model.image_projection == "linear_bias":
        rows += dense_rows("image_projection", "img/head")
    if model.text_projection == "linear_bias":
        rows += dense_rows("text_projection", "txt/head")
    if model.logit_bias_init is not None:
        rows.append(same("logit_bias", "b", shape=(1,)))
    return rows


def _require_towers(model: ModelConfig) -> None:
    image, text = model.image, model.text
    if image.kind == "resnet":
        raise UserError(f"{_TARGET} cannot express model.image.kind='resnet' here")
    require(image, VIT | {"position_embedding": "learned"}, where="model.image", target=_TARGET)
    poolings = {"attention": False, "mean": False, "class_token": True}
    if poolings.get(image.pooling) != image.class_token or (
        image.kind == "naflex" and image.class_token
    ):
        raise UserError(
            f"{_TARGET} cannot express model.image.pooling={image.pooling!r} with class_token="
            f"{image.class_token} in a tower of kind {image.kind!r}"
        )
    require(
        text,
        TRANSFORMER | {"kind": "transformer", "causal": False},
        where="model.text",
        target=_TARGET,
    )
    if text.pooling not in ("last", "attention"):
        raise UserError(
            f"{_TARGET} cannot express model.text.pooling={text.pooling!r} (it has 'last' or "
            "'attention')"
        )
    for name in ("image_projection", "text_projection"):
        if getattr(model, name) not in ("linear_bias", "none"):
            raise UserError(
                f"{_TARGET} cannot express model.{name}={getattr(model, name)!r} (it has "
                "'linear_bias' or 'none')"
            )
