"""FLOPs of one matrix product or convolution of a program's text (2 per multiply-add)."""

import math
import re

Shape = tuple[int, ...]

_WINDOW = re.compile(r"window=\{([^}]*)\}")
# convForward, convForwardGraph, convBiasActivationForward; gradients.
CUDNN_CONVOLUTION = re.compile(r'"__cudnn\$conv(BackwardInput|BackwardFilter|\w*Forward\w*)"')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


def dot_flops(text: str, left: Shape, result: Shape) -> int:
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", text)
    assert dims is not None, text
    contracted = math.prod(left[int(d)] for d in dims[1].split(",") if d)
    return 2 * math.prod(result) * contracted


def gemm_flops(text: str, left: Shape, result: Shape) -> int:
    """Of a call of cuBLAS, which has the dims in its backend_config."""
    dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', text)
    assert dims is not None, text
    contracted = math.prod(left[int(d)] for d in re.findall(r"\d+", dims[1]))
    return 2 * math.prod(result) * contracted


def cudnn_flops(text: str, left: Shape, right: Shape, result: Shape) -> int:
    """Of a call of cuDNN: a convolution, or its gradient by its input or its filter.

    All three multiply the same elements. Window and dim_labels are those of the convolution itself,
    whichever of its three arrays the call makes.
    """
    target = CUDNN_CONVOLUTION.search(text)
    assert target is not None, text
    if target[1] == "BackwardInput":  # of the output's gradient and the filter
        return convolution_flops(text, result, right, left)
    if target[1] == "BackwardFilter":  # of the input and the output's gradient
        return convolution_flops(text, left, result, right)
    return convolution_flops(text, left, right, result)


def convolution_flops(text: str, left: Shape, right: Shape, result: Shape) -> int:
    """Multiply-adds with padding and the holes of dilation left out.

    TPUs write every product as a convolution, batched ones with a window over the batch of which
    one place in each position is inside.
    """
    labels = _LABELS.search(text)
    assert labels is not None, text
    spatial = sorted(label for label in labels[1] if label.isdigit())
    window = _windows(text, len(spatial))
    features = math.prod(s for label, s in zip(labels[2], right, strict=True) if label == "i")
    outputs = math.prod(s for label, s in zip(labels[3], result, strict=True) if label in "bf")
    inside = 1
    for label, settings in zip(spatial, window, strict=True):
        inside *= _places_inside(
            left[labels[1].index(label)], result[labels[3].index(label)], settings
        )
    return 2 * outputs * features * inside


def _windows(text: str, num_dims: int) -> list[dict[str, tuple[int, ...]]]:
    """Of each spatial dim: size, stride, pad (low, high), lhs_dilate, rhs_dilate."""
    match = _WINDOW.search(text)
    window: list[dict[str, tuple[int, ...]]] = [{} for _ in range(num_dims)]
    for part in match[1].split() if match else ():
        name, values = part.split("=")
        for dim, value in enumerate(values.split("x")):
            window[dim][name] = tuple(int(n) for n in value.split("_"))
    return window


def _places_inside(size: int, num_outputs: int, settings: dict[str, tuple[int, ...]]) -> int:
    """Pairs of an output and a place of its window that fall on an element of the input."""
    (width,), (stride,) = settings.get("size", (1,)), settings.get("stride", (1,))
    (between,), (apart,) = settings.get("lhs_dilate", (1,)), settings.get("rhs_dilate", (1,))
    low = settings.get("pad", (0, 0))[0]
    count = 0
    for place in range(width):
        # Positions output * stride + shift in the dilated input; elements are `between` apart.
        shift = place * apart - low
        count += sum(
            1
            for output in range(num_outputs)
            if (output * stride + shift) % between == 0
            and 0 <= (output * stride + shift) // between < size
        )
    return count
