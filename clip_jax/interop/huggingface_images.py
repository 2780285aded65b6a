"""How images come to a model's size: preprocessor_config.json to and from our settings.

Defaults are those of transformers' image processors of the same names.
"""

import re
from pathlib import Path
from typing import Any

from clip_jax.config import ImageTowerConfig, UserError
from clip_jax.interop.huggingface_files import Fields, group, read_json

_HALF = [0.5, 0.5, 0.5]
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_INTERPOLATIONS = {"bilinear": 2, "bicubic": 3}  # PIL's numbers

_COMMON = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIP": _COMMON
    | {
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": 224,
        "resample": 3,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
    },
    "Siglip": _COMMON | {"size": 224, "resample": 3, "image_mean": _HALF, "image_std": _HALF},
    "Siglip2": _COMMON
    | {
        "patch_size": 16,
        "max_num_patches": 256,
        "resample": 2,
        "image_mean": _HALF,
        "image_std": _HALF,
    },
    "ViT": _COMMON | {"size": 224, "resample": 2, "image_mean": _HALF, "image_std": _HALF},
}
_NAME = re.compile(r"(CLIP|Siglip2|Siglip|ViT)(ImageProcessor|FeatureExtractor)(Fast|Pil)?")


def read_preprocessing(
    directory: Path, tower: ImageTowerConfig, *, usual: str = ""
) -> dict[str, Any]:
    """mean, std, resize, interpolation and, for naflex, max_num_patches.

    tower: with its kind, sizes and pooling. usual: the processor of such towers where the files do
    not name it ('CLIP', 'Siglip', 'Siglip2', 'ViT'), by default told by the tower. Without a file:
    as that one has it by default, at the tower's size. Raises UserError for what our preprocessing
    cannot do.
    """
    values, where = _values(directory)
    if not usual:
        usual = "Siglip2" if tower.kind == "naflex" else "Siglip"
        usual = usual if tower.pooling == "attention" else "CLIP"
    if values is None:
        size: dict[str, Any] = {"shortest_edge": tower.image_size} if usual == "CLIP" else {}
        square = {"height": tower.image_size, "width": tower.image_size}
        values = {"size": size or square, "crop_size": square, "patch_size": tower.patch_size}
    name = values.get("image_processor_type") or values.get("feature_extractor_type")
    known = _NAME.fullmatch(name) if isinstance(name, str) else None
    if name is not None and known is None:
        raise UserError(
            f"{where}: unknown image processor {name!r}; known: those of CLIP, Siglip, Siglip2, ViT"
        )
    kind = known[1] if known else usual
    if (kind == "Siglip2") != (tower.kind == "naflex"):
        raise UserError(f"{where}: {name or kind} does not make the inputs of this image tower")
    fields = Fields(values, _DEFAULTS[kind], where)
    fields.expect("do_resize", True)
    fields.expect("do_rescale", True)
    if abs(fields.number("rescale_factor") * 255 - 1) > 1e-6:
        raise UserError(f"{where}: rescale_factor must be 1/255, got {values['rescale_factor']}")
    result = _normalisation(fields, values, _DEFAULTS[kind]) | {
        "interpolation": _interpolation(fields)
    }
    if tower.kind == "naflex":
        if fields.side("patch_size") != tower.patch_size:
            raise UserError(
                f"{where}: patch_size {fields.side('patch_size')} is not the model's "
                f"{tower.patch_size}"
            )
        most = fields.positive("max_num_patches")
        return result | {"resize": "squash", "max_num_patches": most}
    return result | {"resize": _resize(fields, values, _DEFAULTS[kind], tower.image_size)}


def preprocessor_config(tower: ImageTowerConfig, processor_class: str) -> dict[str, Any]:
    """The other way."""
    side = tower.image_size
    square = {"height": side, "width": side}
    kind: dict[str, Any]
    if tower.kind == "naflex":
        kind = {
            "image_processor_type": "Siglip2ImageProcessor",
            "patch_size": tower.patch_size,
            "max_num_patches": tower.max_num_patches,
        }
    elif tower.resize == "shortest":
        kind = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": side},
            "do_center_crop": True,
            "crop_size": square,
        }
    else:
        kind = {"image_processor_type": "SiglipImageProcessor", "size": square}
    return kind | {
        "processor_class": processor_class,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": _INTERPOLATIONS[tower.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(tower.mean),
        "image_std": list(tower.std),
    }


def _values(directory: Path) -> tuple[dict[str, Any] | None, str]:
    path = directory / "preprocessor_config.json"
    if path.is_file():
        return read_json(path), str(path)
    path = directory / "processor_config.json"  # where transformers 5 keeps it
    if path.is_file():
        values = group(read_json(path), "image_processor", str(path))
        return values or None, f"{path} image_processor"
    return None, str(directory / "preprocessor_config.json")


def _normalisation(
    fields: Fields, values: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, Any]:
    if not fields.flag("do_normalize"):
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    result = {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        channels = values.get(theirs) or defaults[theirs]
        numbers = isinstance(channels, list) and all(isinstance(c, int | float) for c in channels)
        if not numbers or len(channels) != 3 or (ours == "std" and min(channels) <= 0):
            raise UserError(f"{fields.where}: {theirs} must be three numbers, got {channels!r}")
        result[ours] = tuple(float(channel) for channel in channels)
    return result


def _interpolation(fields: Fields) -> str:
    resample = fields.integer("resample")
    for name, number in _INTERPOLATIONS.items():
        if number == resample:
            return name
    raise UserError(f"{fields.where}: resample must be 2 (bilinear) or 3 (bicubic), got {resample}")


def _resize(
    fields: Fields, values: dict[str, Any], defaults: dict[str, Any], image_size: int
) -> str:
    """How an image gets to `image_size`, where the file says that it does."""
    size = values.get("size") or defaults["size"]
    crops = "do_center_crop" in fields and fields.flag("do_center_crop")
    if isinstance(size, int):  # before transformers 4.26: of CLIP's the shorter side, else both
        size = {"shortest_edge": size} if crops else {"height": size, "width": size}
    if not isinstance(size, dict):
        raise UserError(f"{fields.where}: size must be a group of settings, got {size!r}")
    crop = _crop_side(values.get("crop_size") or defaults.get("crop_size")) if crops else None
    if size == {"shortest_edge": image_size} and crop == image_size:
        return "shortest"
    if size == {"height": image_size, "width": image_size} and crop in (None, image_size):
        return "squash"
    cropped = f" cropped to {crop}" if crops else ""
    raise UserError(
        f"{fields.where}: size {size}{cropped} does not bring images to the model's {image_size} "
        f"x {image_size} pixels in one step (all of them, or the shorter side and a centre crop)"
    )


def _crop_side(size: Any) -> Any:
    if isinstance(size, dict) and size.get("height") == size.get("width"):
        return size.get("height")
    return size
