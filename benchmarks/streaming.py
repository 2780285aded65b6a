"""Samples a second out of a bucket 50 ms away: tars in sequence against random access.

    python benchmarks/streaming.py

The bucket is an fsspec filesystem in memory: every request takes 50 ms, and its bytes come at 100
MB/s. 16 tars of 256-pixel JPEGs; batches at 224 pixels, ready for training. Also reads alone, with
nothing decoded, and how long the first batch takes at the start and after an interruption.
"""

import argparse
import dataclasses
import io
import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import fsspec
import numpy as np
from environment import environment
from fsspec.spec import AbstractFileSystem
from PIL import Image
from sklearn.datasets import load_sample_images

from clip_jax.config import DataConfig, ImageTowerConfig, SourceConfig, StreamConfig
from clip_jax.data.pipeline import training_batches
from clip_jax.data.sources.webdataset import WebdatasetSource
from clip_jax.data.stream_batches import stream_batches
from clip_jax.data.stream_buffer import StreamBuffer
from clip_jax.data.streams import WINDOW_BYTES, SampleStream, StreamedSource
from clip_jax.data.text_inputs import PaddedText
from clip_jax.data.tokenizers import Tokenizer

RESULTS = Path(__file__).parent / "results" / "streaming.json"
NUM_TARS, TAR_SAMPLES = 16, 200
LATENCY, BANDWIDTH = 0.05, 100e6  # seconds; bytes a second of one request
IMAGE = ImageTowerConfig(image_size=224, patch_size=32)
PATH = f"bucket://set/{{00..{NUM_TARS - 1}}}.tar"
STREAM = StreamConfig(num_streams=8, interleave=2, window=256)


class Bucket(AbstractFileSystem):
    protocol = "bucket"
    files: dict[str, bytes] = {}  # noqa: RUF012 - of the class: fsspec makes many of it

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        time.sleep(LATENCY)
        name = self._strip_protocol(path)
        if name not in self.files:
            raise FileNotFoundError(path)
        return self._details(name)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        time.sleep(LATENCY)
        return [self._details(name) if detail else name for name in self.files]

    def _details(self, name: str) -> dict[str, Any]:
        return {"name": name, "size": len(self.files[name]), "type": "file", "etag": "1"}

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        name = self._strip_protocol(path)
        data = self.files.get(name, b"")[start:end]
        time.sleep(LATENCY + len(data) / BANDWIDTH)
        if name not in self.files:
            raise FileNotFoundError(path)
        return data


def fill_bucket() -> float:
    """Write the tars into the bucket; returns bytes per sample."""
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = np.random.default_rng(0)
    for number in range(NUM_TARS):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for sample in range(TAR_SAMPLES):
                left, top = rng.integers(0, 128, 2)
                box = (left, top, left + 290, top + 290)
                jpeg = io.BytesIO()
                photos[sample % 2].resize((256, 256), box=box).save(jpeg, "JPEG", quality=90)
                members = {"jpg": jpeg.getvalue(), "txt": b"a photo of a temple or a flower"}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{number:02d}{sample:04d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        Bucket.files[f"set/{number:02d}.tar"] = content.getvalue()
    return sum(map(len, Bucket.files.values())) / (NUM_TARS * TAR_SAMPLES)


def rate(batches: Any, batch_size: int, seconds: float) -> dict[str, float]:
    """Samples a second after the first batch, and the seconds that this one took."""
    start = time.perf_counter()
    next(batches)
    first = began = time.perf_counter()
    count = 0
    while time.perf_counter() - began < seconds or not count:
        next(batches)
        count += 1
    end = time.perf_counter()
    return {
        "samples_per_second": round(count * batch_size / (end - first), 1),
        "first_batch_seconds": round(first - start, 2),
    }


def streaming(config: DataConfig, text: PaddedText, batch_size: int) -> dict[str, Any]:
    def open_batches(states: Any, start_sample: int) -> Any:
        return stream_batches(
            config,
            text,
            image=IMAGE,
            seed=0,
            global_batch_size=batch_size,
            process_index=0,
            process_count=1,
            states=states,
            start_sample=start_sample,
        )

    with open_batches(None, 0) as batches:
        row = rate(batches, batch_size, 5)
        figures = batches.stats()
        states = batches.states()
    with open_batches(states, batch_size) as batches:
        again = rate(batches, batch_size, 0)
    row["first_batch_after_resume_seconds"] = again["first_batch_seconds"]
    row |= {
        name.removeprefix("data/"): round(value, 3)
        for name, value in figures.items()
        if name.endswith("_ms")
    }
    return {"reader": "streams", "threads": config.num_threads} | row


def random_access(
    config: DataConfig, text: PaddedText, cache: Path, num_threads: int
) -> dict[str, Any]:
    batch_size = 32  # each thread makes one at a time
    start = time.perf_counter()
    source = WebdatasetSource(PATH, cache)
    opened = round(time.perf_counter() - start, 2)
    config = dataclasses.replace(config, num_threads=num_threads, prefetch_batches=num_threads)
    with training_batches(
        config,
        {"bucket": source},
        text,
        image=IMAGE,
        seed=0,
        global_batch_size=batch_size,
        process_index=0,
        process_count=1,
        start_sample=0,
    ) as batches:
        # As many batches are made at a time as there are threads: they come in bursts.
        for _ in range(num_threads):
            next(batches)
        row = rate(batches, batch_size, 5)
    return {"reader": "random access", "threads": num_threads, "open_seconds": opened} | row


def reading_alone(seconds: float = 3) -> dict[str, Any]:
    """Samples a second of one stream, and of all of them in one process; nothing is decoded."""
    tars = tuple(f"bucket://{name}" for name in sorted(Bucket.files))
    source = StreamedSource(name="bucket", tars=tars)
    result: dict[str, Any] = {"reader": "streams, reading alone"}
    for count in (1, STREAM.num_streams):
        buffers = [
            StreamBuffer(
                SampleStream(source, stream, config=STREAM, seed=0), STREAM.window, WINDOW_BYTES
            )
            for stream in range(count)
        ]
        for buffer in buffers:
            buffer.take()
        start = time.perf_counter()
        taken = 0
        while time.perf_counter() - start < seconds:
            for buffer in buffers:
                buffer.take()
            taken += count
        result[f"{count}_streams_samples_per_second"] = round(taken / seconds)
        for buffer in buffers:
            buffer.close()
    return result


def shown(row: dict[str, Any]) -> dict[str, Any]:
    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=128)
    batch_size = parser.parse_args().batch
    sample_bytes = fill_bucket()
    text = PaddedText(Tokenizer.clip(), 77)
    source = SourceConfig(access="stream", path=PATH)
    config = DataConfig(sources={"bucket": source}, stream=STREAM, num_threads=2)
    rows = [shown(streaming(config, text, batch_size))]
    with tempfile.TemporaryDirectory() as folder:
        for threads in (2, 32):
            rows.append(shown(random_access(config, text, Path(folder), threads)))
    rows.append(shown(reading_alone()))
    result = {
        "environment": environment(),
        "latency_seconds": LATENCY,
        "bytes_per_second_of_a_request": BANDWIDTH,
        "tars": NUM_TARS,
        "samples_per_tar": TAR_SAMPLES,
        "bytes_per_sample": round(sample_bytes),
        "batch": batch_size,
        "stream": dataclasses.asdict(STREAM),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
