"""Two photographs, 640 x 427 pixels: a temple and a flower; and what others make of them."""

import functools
import importlib.util
from types import ModuleType

import pytest
from peers import open_clip_or_skip
from PIL import Image


@functools.cache
def photos() -> list[Image.Image]:
    """Real pixels, from scikit-learn; skips the test where it is not installed."""
    datasets = pytest.importorskip("sklearn.datasets")
    return [Image.fromarray(pixels) for pixels in datasets.load_sample_images().images]


def processors_or_skip(family: str) -> ModuleType:
    """transformers' image processors of a family that use Pillow."""
    if importlib.util.find_spec("torchvision") is not None:
        open_clip_or_skip()  # makes torchvision importable, which transformers tries
    return pytest.importorskip(f"transformers.models.{family}.image_processing_pil_{family}")
