"""Libraries that tests run side by side with ours, imported so that torch's CPU build will do."""

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

_KEPT_ALIVE = []  # torch forgets operators when their Library goes


def open_clip_or_skip() -> ModuleType:
    """open_clip with timm, wherever they are on the path; skips the test where they are not."""
    import pytest  # benchmarks do without

    if reason := _what_is_missing():
        pytest.skip(reason)
    import torch

    torch.set_num_threads(1)
    return open_clip()


def open_clip() -> ModuleType:
    """open_clip with timm, wherever they are on the path. Raises ImportError where they are not."""
    if reason := _what_is_missing():
        raise ImportError(reason)
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, not ours
        define_missing_operators(torch)
        import open_clip
    return open_clip


def _what_is_missing() -> str | None:
    for name in ("torch", "open_clip", "timm", "torchvision"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed (pip install 'clip-jax-training[verify]')"
    return None


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
