import dataclasses
import hashlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from data.batches import (
    CONFIG,
    IMAGE,
    ONE,
    digest,
    global_batches,
    host_batches,
    joined,
    padded_text,
    small_tokenizer,
)
from data.tars import pairs, png, write_tar
from PIL import Image

from clip_jax.config.errors import UserError
from clip_jax.config.schema import AugmentConfig, ImageTowerConfig, SourceConfig
from clip_jax.data.pipeline import evaluation_batches, sample_keys
from clip_jax.data.source_captions import captions, training_captions
from clip_jax.data.sources.webdataset import WebdatasetSource


@pytest.fixture(scope="module")
def tokenizer(tar_sources):
    return small_tokenizer(tar_sources)


@pytest.fixture(scope="module")
def text(tokenizer):
    return padded_text(tokenizer)


def test_batch_shapes(tar_sources, text):
    (batch,) = global_batches(tar_sources, text, 1)
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "image": (np.uint8, (8, 12, 12, 3)),
        "tokens": (np.int32, (8, 8)),
    }


NAFLEX = ImageTowerConfig(kind="naflex", patch_size=4, max_num_patches=10)


def test_naflex_batches(tar_sources, text):
    (batch,) = global_batches(tar_sources, text, 1, image=NAFLEX)
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "patches": (np.uint8, (8, 10, 48)),
        "patch_mask": (np.bool_, (8, 10)),
        "spatial_shapes": (np.int32, (8, 2)),
        "tokens": (np.int32, (8, 8)),
    }
    assert (batch["spatial_shapes"] == 3).all()  # the pictures are squares
    assert (batch["patch_mask"].sum(axis=1) == 9).all()
    assert batch["patches"][:, :9].any(axis=(1, 2)).all()


@pytest.fixture(scope="module")
def expected(tar_sources, text):
    return digest(global_batches(tar_sources, text, 14))


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts(tar_sources, text, expected, hosts):
    assert digest(global_batches(tar_sources, text, 14, hosts=hosts)) == expected


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers(tar_sources, text, expected, workers):
    config = dataclasses.replace(CONFIG, num_workers=workers)
    assert digest(global_batches(tar_sources, text, 14, config=config)) == expected


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_any_number_of_threads(tar_sources, text, expected, threads):
    config = dataclasses.replace(CONFIG, num_threads=threads, prefetch_batches=3)
    assert digest(global_batches(tar_sources, text, 14, config=config)) == expected


_PROCESS = """
import hashlib, itertools, json, pathlib, sys
from data.batches import host_batches, padded_text, small_tokenizer
from clip_jax.data.sources.webdataset import WebdatasetSource

folder, host, hosts = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
sources = {
    name: WebdatasetSource(f"{folder}/{name}*.tar", folder / "index") for name in ("large", "small")
}
text = padded_text(small_tokenizer(sources))
with host_batches(sources, text, host=host, hosts=hosts) as batches:
    for batch in itertools.islice(batches, 14):
        rows = zip(batch["image"], batch["tokens"], strict=True)
        print(json.dumps([hashlib.sha256(i.tobytes() + t.tobytes()).hexdigest() for i, t in rows]))
"""


def test_processes_share_the_global_order_out(tar_sources, text):
    folder = tar_sources["small"].path.rpartition("/")[0]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, folder, str(host), "2"],
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu"},
        )
        for host in range(2)
    ]
    lines = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    parts = [json.loads(line) for batch in zip(*lines, strict=True) for line in batch]
    whole = [
        hashlib.sha256(image.tobytes() + tokens.tobytes()).hexdigest()
        for batch in global_batches(tar_sources, text, 14)
        for image, tokens in zip(batch["image"], batch["tokens"], strict=True)
    ]
    assert [row for part in parts for row in part] == whole
    assert len(set(whole)) == 14 * 8  # so that no other order would have passed


SKIPPED = dataclasses.replace(CONFIG, skipped_ranges=((30, 41), (13, 20), (18, 21)))


@pytest.mark.parametrize("config", [CONFIG, SKIPPED])
def test_starts_anywhere(tar_sources, text, config):
    whole = global_batches(tar_sources, text, 14, config=config)
    for start, hosts in ((8, 2), (51, 1), (53, 4)):
        batches = global_batches(
            tar_sources, text, 2, config=config, start_sample=start, hosts=hosts
        )
        for name in ("image", "tokens"):
            assert (joined(batches, name) == joined(whole, name)[start : start + 16]).all()


def test_skipped_ranges_are_passed_over(tar_sources, text):
    whole = joined(global_batches(tar_sources, text, 14), "image")
    kept = [*range(13), *range(21, 30), *range(41, 112)]
    images = joined(global_batches(tar_sources, text, 11, config=SKIPPED, hosts=2), "image")
    assert (images == whole[kept][:88]).all()
    keys = sample_keys(CONFIG, tar_sources, seed=0, positions=kept)
    assert sample_keys(SKIPPED, tar_sources, seed=0, positions=range(93)) == keys


def test_another_batch_size_is_the_same_stream(tar_sources, text):
    small = global_batches(tar_sources, text, 4, batch=8)
    large = global_batches(tar_sources, text, 1, batch=32)
    assert (joined(small, "image") == large[0]["image"]).all()


def test_seeds_differ(tar_sources, text, expected):
    assert digest(global_batches(tar_sources, text, 14, seed=1)) != expected


def test_batches_hold_the_samples_that_sample_keys_names(tar_sources, tokenizer, text):
    augment = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    config = dataclasses.replace(CONFIG, augment=augment, decode="exact")
    batches = global_batches(tar_sources, text, 10, config=config)
    keys = sample_keys(config, tar_sources, seed=0, positions=range(80))
    texts = [tokenizer.decode(row) for row in joined(batches, "tokens")]
    for key, caption, image in zip(keys, texts, joined(batches, "image"), strict=True):
        number = int(key[-4:])
        assert caption == "caption " + " ".join(str(number))
        drawn = Image.open(io.BytesIO(png(number))).resize((12, 12), Image.Resampling.BICUBIC)
        difference = image.astype(int) - np.asarray(drawn)
        assert abs(difference).mean() < 15  # of noise; between two pictures it is 50
    assert sum(key.startswith("large/") for key in keys) == 60
    assert len(set(keys[:50])) > len(set(keys)) - 12


def test_views_differ_between_epochs(tar_sources, text):
    config = dataclasses.replace(CONFIG, sources={"small": SourceConfig()})
    sources = {"small": tar_sources["small"]}
    (batch,) = global_batches(sources, text, 1, config=config, batch=11)
    (later,) = global_batches(sources, text, 1, config=config, batch=11, start_sample=11)
    keys = sample_keys(config, sources, seed=0, positions=range(22))
    assert sorted(keys[:11]) == sorted(keys[11:])
    assert keys[:11] != keys[11:]
    for slot, key in enumerate(keys[:11]):
        assert (batch["image"][slot] != later["image"][keys[11:].index(key)]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 52}, "51 samples in all data sources are fewer than global_batch_size 52"),
        ({"batch": 9, "hosts": 2}, "9 is not divisible by 2 processes; nearest: 8 or 10"),
        ({"batch": 3, "hosts": 4}, "3 is not divisible by 4 processes; nearest: 4$"),
    ],
)
def test_mistakes(tar_sources, text, options, message):
    with pytest.raises(UserError, match=message):
        global_batches(tar_sources, text, 1, **options)


@pytest.mark.parametrize("skipped", [(), ((3, 6),)])
def test_samples_that_would_come_twice(tar_sources, text, skipped):
    config = dataclasses.replace(CONFIG, repeat=False, skipped_ranges=skipped)
    most = 44 if skipped else 47  # every fourth is from the small source, which has 11
    keys = sample_keys(config, tar_sources, seed=0, positions=range(most))
    assert len(set(keys)) == most
    host_batches(tar_sources, text, config=config, num_samples=most).close()
    message = rf"^{most + 1} samples .*'small' more than once \(12 of its 11\).*seen={most}, or"
    with pytest.raises(UserError, match=message):
        host_batches(tar_sources, text, config=config, num_samples=most + 1)


def test_evaluation_reads_ahead(tar_sources, text):
    shape = {"image": IMAGE, "context_length": 8, "process_index": 0, "process_count": 1}
    one, two = (
        evaluation_batches(tar_sources["small"], None, **shape, batch_size=4, num_threads=threads)
        for threads in (0, 2)
    )
    with one, two:
        batches = list(two)
        assert [set(batch) for batch in batches] == [{"image", "mask", "index"}] * 3
        assert digest(batches) == digest(list(one))
    with pytest.raises(UserError, match=r"evaluation.batch_size 3 is not divisible by 2 processes"):
        evaluation_batches(
            tar_sources["small"], None, **shape | {"process_count": 2}, batch_size=3, num_threads=1
        )


def test_captions(tar_sources, tmp_path):
    texts = captions(tar_sources["small"], "own")
    assert texts == [f"caption {number}" for number in range(100, 111)]
    members = dict(pairs(0, 2)) | {"s0001.txt": b" "}
    damaged = WebdatasetSource(str(write_tar(tmp_path / "d.tar", members.items())), tmp_path / "i")
    with pytest.raises(UserError, match="key s0001: no caption"):
        captions(damaged, "own")
    assert list(training_captions({"s": damaged})) == ["caption 0"]


def test_training_captions_are_those_of_all_sources(tar_sources):
    texts = list(training_captions(tar_sources))
    assert len(texts) == 51
    assert texts == list(training_captions(dict(reversed(tar_sources.items()))))


def test_stats_cover_the_batches_that_were_returned(tar_sources, text):
    sources = {"s": tar_sources["large"]}
    with host_batches(sources, text, config=ONE, batch=16) as batches:
        for _ in range(3):
            next(batches)
        stats = batches.stats()
        assert {"data/read_ms", "data/decode_ms", "data/tokenize_ms", "data/batch_ms"} < set(stats)
        assert all(0 < value < 1000 for name, value in stats.items() if name.endswith("_ms"))
        assert not any(value for name, value in stats.items() if not name.endswith("_ms"))
        assert not any(batches.stats().values())  # the next lap
        assert batches.drain_bad_samples() == []
