"""Samples a second from tars to batches: ours and open_clip's own pipeline, and memory over time.

    python benchmarks/loader.py            # about ten minutes; takes the extras `fast` and `verify`
    python benchmarks/loader.py --quick    # a minute, to see that it runs

2,000 JPEGs (crops of scikit-learn's two photographs, 512 px, quality 95) in four tars, with
captions of 4 to 40 words; views of 224 px, open_clip's default augmentation, CLIP's tokenizer.
open_clip's side is `open_clip_train.data.get_wds_dataset` as its own script calls it, sampling
shards with replacement: batches are float32, normalised. Ours are uint8; the model normalises.

Each measurement is a process of its own, which waits for some batches and then times the others;
rounds are interleaved and the best one counts. CPU time is that of all its processes meanwhile:
on a machine that does other work too it is the fairer figure. Memory is the sum of the resident
sizes of all processes, over 200,000 samples of small pictures.
"""

import argparse
import functools
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from environment import environment
from PIL import Image

RESULTS = Path(__file__).parent / "results" / "loader.json"
BATCH = 128
NUM_TARS = 4
WORDS = (
    "a the of with and in on photo image red blue small large old new vintage wooden stock 2019 - |"
    " picture house garden flower temple beach mountain woman man dog cat car street city night"
    " summer white black pack free shipping best quality hand made original portrait landscape"
)
OURS = {
    "ours, 1 thread": {"num_threads": 1},
    "ours, 2 threads": {"num_threads": 2},
    "ours, 1 thread, exact": {"num_threads": 1, "decode": "exact"},
    "ours, 2 threads, exact": {"num_threads": 2, "decode": "exact"},
    "ours, 2 workers": {"num_workers": 2, "num_threads": 1},
}
OPEN_CLIP = {"open_clip, 1 worker": 1, "open_clip, 2 workers": 2}
MEMORY = {"2 threads": {"num_threads": 2}, "2 workers": {"num_workers": 2, "num_threads": 1}}


def write_tars(folder: Path, count: int, side: int) -> None:
    """Crops of two photographs, another for every sample, and captions."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    words = WORDS.split()
    rng = np.random.default_rng(0)
    for number in range(NUM_TARS):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for sample in range(count // NUM_TARS):
                photo = photos[sample % len(photos)]
                scale = rng.uniform(0.6, 1.0)
                width, height = int(photo.width * scale), int(photo.height * scale)
                left = int(rng.integers(photo.width - width + 1))
                top = int(rng.integers(photo.height - height + 1))
                size = side, round(side * height / width)
                box = left, top, left + width, top + height
                picture = photo.resize(size, Image.Resampling.LANCZOS, box=box)
                stream = io.BytesIO()
                picture.save(stream, "JPEG", quality=95)
                length = int(np.clip(rng.lognormal(2.3, 0.5), 4, 40))
                caption = " ".join(rng.choice(words, length))
                for name, data in (("jpg", stream.getvalue()), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{number:03d}{sample:06d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def ours(folder: Path, image_size: int = 224, **options: Any) -> Iterator[Any]:
    from clip_jax.config.schema import DataConfig, ImageTowerConfig, SourceConfig
    from clip_jax.data.pipeline import training_batches
    from clip_jax.data.sources.webdataset import WebdatasetSource
    from clip_jax.data.text_inputs import PaddedText
    from clip_jax.data.tokenizers import Tokenizer

    source = WebdatasetSource(f"{folder}/*.tar", folder / "index")
    return training_batches(
        DataConfig(sources={"tars": SourceConfig()}, **options),
        {"tars": source},
        PaddedText(Tokenizer.clip(), 77),
        image=ImageTowerConfig(image_size=image_size),
        seed=0,
        global_batch_size=BATCH,
        process_index=0,
        process_count=1,
        start_sample=0,
    )


def open_clip(folder: Path, workers: int) -> Iterator[Any]:
    from peers import open_clip_or_skip

    library = open_clip_or_skip()
    if importlib.util.find_spec("pandas") is None:
        sys.modules["pandas"] = types.ModuleType("pandas")  # it is there for CSV files
    from open_clip_train import data

    # It was written for webdataset 0.2, whose tars end without a marker.
    data.tar_file_expander = functools.partial(data.tar_file_expander, eof_value=None)
    arguments = argparse.Namespace(
        train_data=f"{folder}/{{0..{NUM_TARS - 1}}}.tar",
        train_num_samples=10**7,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        seed=0,
        batch_size=BATCH,
        workers=workers,
        world_size=1,
    )
    preprocess = library.image_transform(224, is_train=True)
    tokenizer = library.get_tokenizer("ViT-B-32")
    loader = data.get_wds_dataset(arguments, preprocess, is_train=True, tokenizer=tokenizer)
    return iter(loader.dataloader)


def processes() -> list[int]:
    """This process and those below it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
        children.setdefault(parent, []).append(int(folder.name))
    found = [os.getpid()]
    for process in found:
        found += children.get(process, [])
    return found


def cpu_seconds() -> float:
    ticks = 0
    for process in processes():
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_mib() -> float:
    pages = 0
    for process in processes():
        pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(name: str, folder: Path, num_batches: int) -> dict[str, float]:
    batches = ours(folder, **OURS[name]) if name in OURS else open_clip(folder, OPEN_CLIP[name])
    for _ in range(8):  # workers have started, buffers are full
        next(batches)
    cpu, start = cpu_seconds(), time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    count = num_batches * BATCH
    figures = {"samples_per_second": count / seconds, "cpu_ms_per_sample": 1000 * cpu / count}
    if name in OURS:
        figures |= {
            stage: value for stage, value in batches.stats().items() if stage.endswith("_ms")
        }
        batches.close()
    return figures


def measure_memory(folder: Path, num_samples: int, **options: Any) -> dict[str, Any]:
    """Resident sizes ten times on the way, the first after a tenth of it."""
    sizes: list[float] = []
    every = num_samples // 10 // BATCH
    start = time.perf_counter()
    with ours(folder, image_size=64, **options) as batches:
        for number in range(1, 10 * every + 1):
            next(batches)
            if number % every == 0:
                sizes.append(resident_mib())
                print(f"  {number * BATCH:7} samples: {sizes[-1]:6.0f} MiB", file=sys.stderr)
    return {
        "num_samples": 10 * every * BATCH,
        "samples_per_second": 10 * every * BATCH / (time.perf_counter() - start),
        "resident_mib": sizes,
        "deviation": (max(sizes) - min(sizes)) / (max(sizes) + min(sizes)),
    }


def in_process(name: str, folder: Path, amount: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", name, str(folder), str(amount)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples; writes no results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, folder, amount = arguments.measure
        if name in MEMORY:
            result = measure_memory(Path(folder), int(amount), **MEMORY[name])
        else:
            result = measure(name, Path(folder), int(amount))
        print(json.dumps(result))
        return
    quick = arguments.quick
    results: dict[str, Any] = {"environment": environment(), "batch_size": BATCH}
    print(json.dumps(results["environment"]))
    with tempfile.TemporaryDirectory() as directory:
        photos, small = Path(directory, "photos"), Path(directory, "small")
        for folder, side in ((photos, 512), (small, 96)):
            folder.mkdir()
            write_tars(folder, 400 if quick else 2000, side)
        speeds: dict[str, dict[str, float]] = {}
        for _ in range(1 if quick else arguments.rounds):
            for name in (*OURS, *OPEN_CLIP):
                figures = in_process(name, photos, 10 if quick else 60)
                best = speeds.setdefault(name, figures)
                if figures["samples_per_second"] > best["samples_per_second"]:
                    speeds[name] = figures
                least = min(best["cpu_ms_per_sample"], figures["cpu_ms_per_sample"])
                speeds[name]["cpu_ms_per_sample"] = least
        results["speed"] = speeds
        for name, figures in speeds.items():
            print(
                f"{name:24}{figures['samples_per_second']:8.0f} samples/s"
                f"{figures['cpu_ms_per_sample']:8.2f} ms CPU a sample"
            )
        rate = {name: figures["samples_per_second"] for name, figures in speeds.items()}
        cpu = {name: figures["cpu_ms_per_sample"] for name, figures in speeds.items()}
        peer, two = "open_clip, 2 workers", "ours, 2 threads"
        results["ratios"] = {
            "2 threads : open_clip's 2 workers": rate[two] / rate[peer],
            "2 threads, exact : open_clip's 2 workers": rate[f"{two}, exact"] / rate[peer],
            "2 workers : open_clip's 2 workers": rate["ours, 2 workers"] / rate[peer],
            "CPU time, open_clip's 2 workers : 2 threads": cpu[peer] / cpu[two],
            "2 threads : 1 thread": rate[two] / rate["ours, 1 thread"],
            "2 threads : 1 thread, exact": rate[f"{two}, exact"] / rate["ours, 1 thread, exact"],
        }
        for name, ratio in results["ratios"].items():
            print(f"{name:48}{ratio:5.2f}")
        results["memory"] = {}
        for name in MEMORY:
            print(f"memory, {name}", flush=True)
            memory = in_process(name, small, 20_000 if quick else 200_000)
            results["memory"][name] = memory
            print(f"  {memory['samples_per_second']:.0f} samples/s, +-{memory['deviation']:.1%}")
    if not quick:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
