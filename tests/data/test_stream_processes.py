"""Streams in several processes of the operating system, as hosts have them."""

import json
import subprocess
import sys

from data.tars import pairs, write_tar

_HOST = """
import hashlib, itertools, json, sys
from clip_jax.config.schema import (
    AugmentConfig, DataConfig, ImageTowerConfig, SourceConfig, StreamConfig
)
from clip_jax.data.stream_batches import local_streams, stream_batches
from clip_jax.data.text_inputs import PaddedText
from clip_jax.data.tokenizers import Tokenizer

folder, host, hosts = sys.argv[1], *map(int, sys.argv[2:])
text = PaddedText(Tokenizer.train([f"caption {n}" for n in range(99)], 300, lowercase=True), 8)
config = DataConfig(
    sources={"s": SourceConfig(access="stream", path=folder + "/*.tar")},
    augment=AugmentConfig(crop_scale=(0.4, 1.0), horizontal_flip=0.5, color_jitter=0.5),
    stream=StreamConfig(num_streams=4, interleave=2, window=6),
    num_threads=2,
)
batches = stream_batches(
    config, text, image=ImageTowerConfig(image_size=12, patch_size=4), seed=0, global_batch_size=8,
    process_index=host, process_count=hosts, states=None, start_sample=0,
)
with batches:
    for batch in itertools.islice(batches, 12):
        rows = zip(batch["image"], batch["tokens"], strict=True)
        samples = [hashlib.sha256(i.tobytes() + t.tobytes()).hexdigest() for i, t in rows]
        print(json.dumps([samples, batches.states().tolist()]))
"""


def hosts(folder, count):
    """What so many processes give: of each step, the rows and the states of all streams."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _HOST, str(folder), str(host), str(count)],
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu"},
        )
        for host in range(count)
    ]
    lines = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    steps = [[json.loads(line) for line in step] for step in zip(*lines, strict=True)]
    samples = [row for step in steps for rows, _ in step for row in rows]
    return samples, [state for step in steps for _, states in step for state in states]


def test_two_processes_give_the_batches_of_one(tmp_path):
    for number in range(9):
        write_tar(tmp_path / f"{number}.tar", pairs(7 * number, 7))
    samples, states = hosts(tmp_path, 2)
    assert (samples, states) == hosts(tmp_path, 1)
    assert len(set(samples)) == len(samples) == 12 * 8  # no other order would have passed
