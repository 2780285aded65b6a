"""Pictures as models see them: the random views of training, the one view that scores rest on."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clip_jax.config.schema import AugmentConfig
from clip_jax.data.augment import random_view
from clip_jax.data.decode import MAX_PIXELS, Decode, decode_image
from clip_jax.data.object_view import fitted_object, object_view
from clip_jax.data.resample import Interpolation, resized

Framing = Literal["crop", "object"]
Resize = Literal["shortest", "squash"]


def training_view(
    data: bytes,
    framing: Framing,
    config: AugmentConfig,
    image_size: int,
    rng: np.random.Generator,
    *,
    decode: Decode = "exact",
    interpolation: Interpolation = "bicubic",
) -> NDArray[np.uint8]:
    """Decode a picture and return a random view of it: uint8 [image_size, image_size, 3].

    framing 'object' is always exact and bilinear. Raises BadSampleError as `decode_image` does.
    """
    if framing == "object":
        return object_view(decode_image(data, background=None), config, image_size, rng)
    return random_view(data, config, image_size, rng, decode=decode, interpolation=interpolation)


def evaluation_image(
    image: Image.Image,
    image_size: int,
    framing: Framing = "crop",
    *,
    resize: Resize = "shortest",
    interpolation: Interpolation = "bicubic",
) -> NDArray[np.uint8]:
    """Return the view of an RGB image that scores rest on: uint8 [image_size, image_size, 3].

    framing 'crop': `resize` 'shortest' resizes the shorter side and crops the centre, with
    torchvision's rounding (`Resize`, `CenterCrop`), as open_clip evaluates; transformers' CLIP
    processors round half a margin down where torchvision rounds it to even. 'squash' resizes both
    sides, as SigLIP does. 'object': see `fitted_object`.
    """
    if framing == "object":
        return fitted_object(image, image_size)
    if resize == "squash":
        return np.asarray(resized(image, (image_size, image_size), interpolation))
    width, height = image.size
    if width <= height:
        size = (image_size, int(image_size * height / width))
    else:
        size = (int(image_size * width / height), image_size)
    left = round((size[0] - image_size) / 2)
    top = round((size[1] - image_size) / 2)
    if size[0] * size[1] > MAX_PIXELS:
        # A strip of a picture: only its middle is resized, a grey level apart here and there.
        scale = width / size[0], height / size[1]
        box = (left, top, left + image_size, top + image_size)
        part = (box[0] * scale[0], box[1] * scale[1], box[2] * scale[0], box[3] * scale[1])
        return np.asarray(resized(image, (image_size, image_size), interpolation, part))
    image = resized(image, size, interpolation)
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))
