"""Libraries that tests run side by side with ours, imported so that torch's CPU build will do."""

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import pytest

_KEPT_ALIVE = []  # torch forgets operators when their Library goes


def open_clip_or_skip() -> ModuleType:
    """open_clip with timm, wherever they are on the path; skips the test where they are not."""
    torch = pytest.importorskip("torch")
    for name in ("open_clip", "timm", "torchvision"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (pip install 'clip-jax-training[verify]')")
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, not ours
        define_missing_operators(torch)
        import open_clip
    return open_clip


def define_missing_operators(torch: ModuleType) -> None:
    """Declares what torchvision's Python names of its compiled part, where that does not load.

    The compiled part is built for one build of torch; image transforms do not need it.
    """
    if _KEPT_ALIVE:
        return
    spec = importlib.util.find_spec("torchvision")
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT_ALIVE.append(library)
