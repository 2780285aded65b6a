"""What an image tower takes in, made from pictures: one image, or the patches of NaFlex.

Inputs are the image part of a batch, without its leading axis: `image` uint8 [S, S, 3], or for a
tower of kind 'naflex' `patches` uint8 [N, D], `patch_mask` bool [N] and `spatial_shapes` int32 [2],
the rows and columns of patches. Normalisation happens in the tower.

Shape suffixes: S image side, N patches of a sequence, D values of a patch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clip_jax.config.schema import AugmentConfig, ImageTowerConfig
from clip_jax.data.augment import flip_and_recolor
from clip_jax.data.decode import Decode, decode_image, open_picture, upright_rgb
from clip_jax.data.naflex import PatchSequence, naflex_patches, naflex_size, patch_sequence
from clip_jax.data.transforms import Framing, evaluation_image, training_view

Inputs = dict[str, NDArray[np.generic]]
Picture = Image.Image | str | Path | bytes


@dataclass(frozen=True)
class Preprocess:
    """Turns pictures into what `CLIP.encode_image` takes, as evaluation does.

    image: the tower's config. framing: `DataConfig.framing` of the run that trained it.

    Takes a PIL image, a path or the bytes of a file (JPEG, PNG or WebP), or a list of them, whose
    inputs get a leading axis. For RGB and gray images the
    result is open_clip's, by the same Pillow calls. Others open_clip takes as they are, while here
    pictures are turned upright by their EXIF data, transparent pixels lie on white, and 16 bits
    are scaled to 8. Raises ValueError as `decode_image` does, OSError for a file that is not there.
    """

    image: ImageTowerConfig
    framing: Framing = "crop"

    def __call__(self, picture: Picture | Sequence[Picture]) -> Inputs:
        if not isinstance(picture, Picture):
            rows = [self(one) for one in picture]
            return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if isinstance(picture, Image.Image):
            rgb = upright_rgb(picture)
        else:
            data = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
            rgb = decode_image(data)
        return evaluation_inputs(rgb, self.image, self.framing)


def evaluation_inputs(picture: Image.Image, image: ImageTowerConfig, framing: Framing) -> Inputs:
    """The view of an RGB picture that scores rest on; see `evaluation_image` and `naflex`."""
    if image.kind == "naflex":
        if framing == "object":
            return _object_patches(evaluation_image(picture, _object_side(image), framing), image)
        return _patch_inputs(
            naflex_patches(
                picture,
                patch_size=image.patch_size,
                max_num_patches=image.max_num_patches,
                interpolation=image.interpolation,
            )
        )
    view = evaluation_image(
        picture,
        image.image_size,
        framing,
        resize=image.resize,
        interpolation=image.interpolation,
    )
    return {"image": view}


def training_inputs(
    data: bytes,
    image: ImageTowerConfig,
    framing: Framing,
    augment: AugmentConfig,
    rng: np.random.Generator,
    *,
    decode: Decode = "exact",
) -> Inputs:
    """A random view of an encoded picture; `decode` is for framing 'crop': see `Picture.view`.

    NaFlex takes pictures whole, in their own aspect ratio: of the augmentation of 'crop', flips and
    colours alone. Raises BadSampleError as `decode_image` and `naflex_size` do.
    """
    interpolation = image.interpolation
    if image.kind != "naflex":
        size = image.image_size
        view = training_view(
            data, framing, augment, size, rng, decode=decode, interpolation=interpolation
        )
        return {"image": view}
    if framing == "object":
        view = training_view(data, framing, augment, _object_side(image), rng)
        return _object_patches(view, image)
    picture = open_picture(data)
    patches = {"patch_size": image.patch_size, "max_num_patches": image.max_num_patches}
    shape = naflex_size(*picture.size, **patches)
    whole = (0, 0, *picture.size)
    pixels = picture.view(whole, shape, decode=decode, interpolation=interpolation)
    return _patch_inputs(patch_sequence(flip_and_recolor(pixels, augment, rng), **patches))


def blank_inputs(image: ImageTowerConfig, count: int) -> Inputs:
    """Inputs of `count` black images, with a leading axis; those of NaFlex have one patch each.

    Towers get no empty sequence, of which attention would make NaN.
    """
    if image.kind != "naflex":
        return {"image": np.zeros((count, image.image_size, image.image_size, 3), np.uint8)}
    mask = np.zeros((count, image.max_num_patches), np.bool_)
    mask[:, 0] = True
    return {
        "patches": np.zeros((count, image.max_num_patches, image.patch_size**2 * 3), np.uint8),
        "patch_mask": mask,
        "spatial_shapes": np.ones((count, 2), np.int32),
    }


def _object_side(image: ImageTowerConfig) -> int:
    """Pixels: views of objects are squares, the largest one that the sequence holds."""
    return math.isqrt(image.max_num_patches) * image.patch_size


def _object_patches(view: NDArray[np.uint8], image: ImageTowerConfig) -> Inputs:
    patches, most = image.patch_size, image.max_num_patches
    return _patch_inputs(patch_sequence(view, patch_size=patches, max_num_patches=most))


def _patch_inputs(sequence: PatchSequence) -> Inputs:
    return {
        "patches": sequence.patches,
        "patch_mask": sequence.mask,
        "spatial_shapes": np.array(sequence.spatial_shape, np.int32),
    }
