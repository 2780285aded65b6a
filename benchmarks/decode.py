"""Images a second of one core, from a JPEG to a 224 px crop: ours, the peers', and the floor.

    python benchmarks/decode.py        # under a minute; takes the extras `fast` and `verify`

Real photographs (scikit-learn's, and scikit-image's where it is installed), their longer side
resized to 512 and 256 px as img2dataset does it for DataComp, JPEG at quality 95 with 4:2:0 chroma.
All get the same boxes, drawn as open_clip's default training transform draws them. The process is
pinned to a core and its CPU time counts; rounds are interleaved, and each picture's best counts.

The error is the mean absolute difference, in grey levels of 255, to the reference: the whole
picture decoded, the crop resampled by Pillow's antialiased bicubic filter in floating point. The
floor is what any JPEG decoder on a CPU has to do: Huffman decoding, here with the cheapest inverse
transform, that to 1/8 of the size.
"""

import argparse
import importlib.metadata
import importlib.util
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import cv2
import numpy as np
import simplejpeg
from environment import environment
from PIL import Image
from sklearn.datasets import load_sample_images

from clip_jax.config.schema import AugmentConfig
from clip_jax.data.augment import random_crop
from clip_jax.data.decode import open_picture

RESULTS = Path(__file__).parent / "results" / "decode.json"
SIZE = (224, 224)
FLOOR = "floor: Huffman, 1/8"
PILLOW = "Pillow bicubic, as open_clip"
MORE_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


class Task(NamedTuple):
    data: bytes
    box: tuple[int, int, int, int]


Method = Callable[[Task], np.ndarray]


def photos() -> list[Image.Image]:
    images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        return images
    folder = Path(spec.origin).parent / "data"
    return images + [Image.open(folder / name).convert("RGB") for name in MORE_PHOTOS]


def tasks(side: int, boxes: int) -> list[Task]:
    made = []
    for number, photo in enumerate(photos()):
        scale = side / max(photo.size)
        size = round(photo.width * scale), round(photo.height * scale)
        stream = io.BytesIO()
        smaller = photo.resize(size, Image.Resampling.LANCZOS)
        smaller.save(stream, "JPEG", quality=95, subsampling="4:2:0")
        picture = open_picture(stream.getvalue())
        rng = np.random.default_rng(number)
        for _ in range(boxes):
            box = random_crop(picture.size, AugmentConfig(), rng)
            made.append(Task(stream.getvalue(), picture.aligned(box, SIZE)))
    return made


def reference(task: Task) -> np.ndarray:
    image = Image.open(io.BytesIO(task.data)).crop(task.box)
    channels = [
        channel.convert("F").resize(SIZE, Image.Resampling.BICUBIC) for channel in image.split()
    ]
    return np.clip(np.stack([np.asarray(channel) for channel in channels], -1), 0, 255)


def ours_fast(task: Task) -> np.ndarray:
    return open_picture(task.data).view(task.box, SIZE, decode="fast")


def ours_exact(task: Task) -> np.ndarray:
    return open_picture(task.data).view(task.box, SIZE, decode="exact")


def pillow(task: Task) -> np.ndarray:
    """What open_clip's loader and torchvision's RandomResizedCrop call on PIL images."""
    image = Image.open(io.BytesIO(task.data)).convert("RGB")
    return np.asarray(image.crop(task.box).resize(SIZE, Image.Resampling.BICUBIC))


def opencv(task: Task) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(task.data, np.uint8), cv2.IMREAD_COLOR)
    left, top, right, bottom = task.box
    small = cv2.resize(pixels[top:bottom, left:right], SIZE, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_BGR2RGB)


def floor(task: Task) -> np.ndarray:
    return simplejpeg.decode_jpeg(task.data, "RGB", min_height=1, min_width=1)


def torchvision_method(task: Task) -> Method | None:
    """Decoding and resampling of uint8 tensors, where torchvision's compiled part loads."""
    try:
        import torch
        from peers import define_missing_operators

        define_missing_operators(torch)
        from torchvision.io import ImageReadMode, decode_jpeg
        from torchvision.transforms.v2 import InterpolationMode, functional
    except (ImportError, OSError, AttributeError) as error:
        print(f"torchvision left out: {error}")
        return None
    torch.set_num_threads(1)

    def method(task: Task) -> np.ndarray:
        pixels = decode_jpeg(
            torch.from_numpy(np.frombuffer(task.data, np.uint8).copy()), ImageReadMode.RGB
        )
        left, top, right, bottom = task.box
        small = functional.resized_crop(
            pixels,
            top,
            left,
            bottom - top,
            right - left,
            list(SIZE),
            InterpolationMode.BICUBIC,
            antialias=True,
        )
        return small.permute(1, 2, 0).contiguous().numpy()

    try:
        method(task)
    except RuntimeError as error:
        print(f"torchvision left out: {str(error).splitlines()[0]}")
        return None
    return method


def tensorflow_method() -> Method | None:
    """The operations that tf.data pipelines map over records: decode the crop, resize."""
    try:
        import tensorflow as tf
    except ImportError as error:
        print(f"tf.data left out: {error}")
        return None
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    def method(task: Task) -> np.ndarray:
        left, top, right, bottom = task.box
        window = [top, left, bottom - top, right - left]
        pixels = tf.image.decode_and_crop_jpeg(task.data, window, channels=3)
        small = tf.image.resize(pixels, SIZE, method="bicubic", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(small), 0, 255), tf.uint8).numpy()

    return method


def measure(methods: dict[str, Method], work: list[Task], rounds: int) -> dict[str, dict]:
    best = {name: [float("inf")] * len(work) for name in methods}
    for _ in range(rounds):
        for number, task in enumerate(work):
            for name, method in methods.items():
                start = time.process_time()
                method(task)
                best[name][number] = min(best[name][number], time.process_time() - start)
    rows = {}
    for name, method in methods.items():
        row = {"images_per_second": len(work) / sum(best[name])}
        if name != FLOOR:
            errors = [np.abs(method(task) - reference(task)).mean() for task in work]
            row |= {"mean_error": float(np.mean(errors)), "worst_error": float(np.max(errors))}
        rows[name] = row
    for row in rows.values():
        row["times_pillow"] = row["images_per_second"] / rows[PILLOW]["images_per_second"]
        row["share_of_floor"] = row["images_per_second"] / rows[FLOOR]["images_per_second"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--boxes", type=int, default=4, help="crops of each photograph")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.core})
    cv2.setNumThreads(0)
    packages = ("pillow", "simplejpeg", "opencv-python-headless", "scikit-image", "tensorflow")
    result: dict = {"libraries": {}, "photos": len(photos()), "side": {}}
    for name in packages:
        try:
            result["libraries"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    methods: dict[str, Method] = {
        "ours, fast": ours_fast,
        "ours, exact": ours_exact,
        PILLOW: pillow,
        "OpenCV, INTER_AREA": opencv,
    }
    first = tasks(512, 1)[0]
    for name, method in (
        ("torchvision on tensors", torchvision_method(first)),
        ("tf.data's operations", tensorflow_method()),
    ):
        if method is not None:
            methods[name] = method
    methods[FLOOR] = floor
    for side in (512, 256):
        work = tasks(side, arguments.boxes)
        rows = measure(methods, work, arguments.rounds)
        result["side"][side] = rows
        print(f"\n{len(work)} crops of {result['photos']} photographs, longer side {side} px")
        print(f"{'':30} {'images/s':>9} {'x Pillow':>9} {'of floor':>9} {'error':>6} {'worst':>6}")
        for name, row in rows.items():
            errors = f"{row['mean_error']:6.2f} {row['worst_error']:6.2f}" if name != FLOOR else ""
            print(
                f"{name:30} {row['images_per_second']:9.0f} {row['times_pillow']:9.2f} "
                f"{row['share_of_floor']:9.0%} {errors}",
                flush=True,
            )
    result["environment"] = environment()
    print(json.dumps(result["environment"] | result["libraries"]))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
