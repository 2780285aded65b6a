import contextlib
import dataclasses
import hashlib
import io
import multiprocessing
import os

import numpy as np
import pytest
from data.tars import pairs, png, write_tar
from PIL import Image

from clip_jax.config.errors import UserError
from clip_jax.config.schema import (
    AugmentConfig,
    DataConfig,
    ImageTowerConfig,
    ObjectViewConfig,
    SourceConfig,
)
from clip_jax.data.pipeline import (
    captions,
    evaluation_batches,
    sample_keys,
    training_batches,
    training_captions,
)
from clip_jax.data.sources.webdataset import WebdatasetSource
from clip_jax.data.tokenizers import Tokenizer

CONFIG = DataConfig(
    sources={"large": SourceConfig(weight=3.0), "small": SourceConfig(weight=1.0)},
    augment=AugmentConfig(crop_scale=(0.4, 1.0), horizontal_flip=0.5, color_jitter=0.5),
)
SHAPE = {"image": ImageTowerConfig(image_size=12, patch_size=4), "context_length": 8}


@pytest.fixture(scope="module")
def tokenizer(tar_sources):
    return Tokenizer.train(training_captions(tar_sources), 300, lowercase=True)


def global_batches(sources, tokenizer, count, *, config=CONFIG, hosts=1, start=0, batch=8, seed=0):
    """The first batches of all hosts, put together."""
    with contextlib.ExitStack() as stack:
        iterators = [
            stack.enter_context(
                training_batches(
                    config,
                    sources,
                    tokenizer,
                    **SHAPE,
                    seed=seed,
                    global_batch_size=batch,
                    process_index=host,
                    process_count=hosts,
                    start_sample=start,
                )
            )
            for host in range(hosts)
        ]
        batches = []
        for _ in range(count):
            parts = [next(iterator) for iterator in iterators]
            batches.append({name: np.concatenate([p[name] for p in parts]) for name in parts[0]})
        return batches


def digest(batches):
    digests = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digests.update(batch[name].tobytes())
    return digests.hexdigest()


def test_batch_shapes(tar_sources, tokenizer):
    (batch,) = global_batches(tar_sources, tokenizer, 1)
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "image": (np.uint8, (8, 12, 12, 3)),
        "tokens": (np.int32, (8, 8)),
    }


NAFLEX = ImageTowerConfig(kind="naflex", patch_size=4, max_num_patches=10)


@pytest.mark.parametrize("workers", [0, 1])
def test_naflex_batches(tar_sources, tokenizer, workers):
    config = dataclasses.replace(CONFIG, num_workers=workers)
    with training_batches(
        config,
        tar_sources,
        tokenizer,
        **(SHAPE | {"image": NAFLEX}),
        seed=0,
        global_batch_size=8,
        process_index=0,
        process_count=1,
        start_sample=0,
    ) as batches:
        batch = next(batches)
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "patches": (np.uint8, (8, 10, 48)),
        "patch_mask": (np.bool_, (8, 10)),
        "spatial_shapes": (np.int32, (8, 2)),
        "tokens": (np.int32, (8, 8)),
    }
    assert (batch["spatial_shapes"] == 3).all()  # the pictures are squares
    assert (batch["patch_mask"].sum(axis=1) == 9).all()
    assert batch["patches"][:, :9].any(axis=(1, 2)).all()


def test_naflex_evaluation(tar_sources, tokenizer):
    with evaluation_batches(
        tar_sources["small"],
        tokenizer,
        **(SHAPE | {"image": NAFLEX}),
        batch_size=8,
        process_index=0,
        process_count=1,
        num_threads=1,
    ) as batches:
        first, last = batches
    assert (first["spatial_shapes"] == 3).all()
    assert last["mask"].tolist() == [True] * 3 + [False] * 5
    assert (last["patch_mask"].sum(axis=1) == [9] * 3 + [1] * 5).all()
    assert (last["spatial_shapes"][3:] == 1).all()
    assert not last["patches"][3:].any()


@pytest.fixture(scope="module")
def expected(tar_sources, tokenizer):
    return digest(global_batches(tar_sources, tokenizer, 14))


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts(tar_sources, tokenizer, expected, hosts):
    assert digest(global_batches(tar_sources, tokenizer, 14, hosts=hosts)) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers(tar_sources, tokenizer, expected, workers):
    config = dataclasses.replace(CONFIG, num_workers=workers)
    assert digest(global_batches(tar_sources, tokenizer, 14, config=config)) == expected
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_any_number_of_threads(tar_sources, tokenizer, expected, threads):
    config = dataclasses.replace(CONFIG, num_threads=threads, prefetch_batches=3)
    assert digest(global_batches(tar_sources, tokenizer, 14, config=config)) == expected


def test_starts_anywhere(tar_sources, tokenizer):
    stream = {
        name: np.concatenate([batch[name] for batch in global_batches(tar_sources, tokenizer, 14)])
        for name in ("image", "tokens")
    }
    for start in (8, 51, 53):
        batches = global_batches(tar_sources, tokenizer, 2, start=start, hosts=2)
        for name, samples in stream.items():
            resumed = np.concatenate([batch[name] for batch in batches])
            assert (resumed == samples[start : start + 16]).all()


def test_another_batch_size_is_the_same_stream(tar_sources, tokenizer):
    small = global_batches(tar_sources, tokenizer, 4, batch=8)
    large = global_batches(tar_sources, tokenizer, 1, batch=32)
    assert (np.concatenate([batch["image"] for batch in small]) == large[0]["image"]).all()


def test_seed_matters(tar_sources, tokenizer, expected):
    assert digest(global_batches(tar_sources, tokenizer, 14, seed=1)) != expected


def test_batches_hold_the_samples_that_sample_keys_names(tar_sources, tokenizer):
    plain = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    config = dataclasses.replace(CONFIG, augment=plain)
    batches = global_batches(tar_sources, tokenizer, 10, config=config)
    keys = sample_keys(config, tar_sources, seed=0, positions=range(80))
    texts = [tokenizer.decode(row) for batch in batches for row in batch["tokens"]]
    images = np.concatenate([batch["image"] for batch in batches])
    for key, text, image in zip(keys, texts, images, strict=True):
        number = int(key[-4:])
        assert text == "caption " + " ".join(str(number))
        drawn = Image.open(io.BytesIO(png(number))).resize((12, 12), Image.Resampling.BICUBIC)
        assert (image == np.asarray(drawn)).all()
    assert sum(key.startswith("large/") for key in keys) == 60
    assert len(set(keys[:50])) > len(set(keys)) - 12


def test_views_differ_between_epochs(tar_sources, tokenizer):
    config = dataclasses.replace(CONFIG, sources={"small": SourceConfig()})
    sources = {"small": tar_sources["small"]}
    (batch,) = global_batches(sources, tokenizer, 1, config=config, batch=11)
    (later,) = global_batches(sources, tokenizer, 1, config=config, batch=11, start=11)
    keys = sample_keys(config, sources, seed=0, positions=range(22))
    assert sorted(keys[:11]) == sorted(keys[11:])
    assert keys[:11] != keys[11:]
    for slot, key in enumerate(keys[:11]):
        assert (batch["image"][slot] != later["image"][keys[11:].index(key)]).any()


@pytest.mark.parametrize("choice", ["first", "random"])
def test_caption_choice(tmp_path, tokenizer, choice):
    members = [("a.png", png(0)), ("a.json", b'{"captions": ["caption 1", "caption 2"]}')]
    source = WebdatasetSource(str(write_tar(tmp_path / "a.tar", members)), tmp_path / "index")
    config = DataConfig(sources={"s": SourceConfig(captions=choice)})
    batches = global_batches({"s": source}, tokenizer, 60, config=config, batch=1)
    texts = [tokenizer.decode(batch["tokens"][0]) for batch in batches]
    assert 15 < texts.count("caption 1") < 45 if choice == "random" else set(texts) == {"caption 1"}


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.8, 40, 56), (1.0, 60, 60)])
def test_share_of_the_first_caption(tmp_path, tokenizer, share, low, high):
    members = [("a.png", png(0)), ("a.json", b'{"captions": ["caption 1", "caption 2"]}')]
    source = WebdatasetSource(str(write_tar(tmp_path / "a.tar", members)), tmp_path / "index")
    config = DataConfig(sources={"s": SourceConfig(first_caption=share)})
    batches = global_batches({"s": source}, tokenizer, 60, config=config, batch=1)
    texts = [tokenizer.decode(batch["tokens"][0]) for batch in batches]
    assert low <= texts.count("caption 1") <= high


def test_framing_object(tar_sources, tokenizer):
    object_view = ObjectViewConfig(scale=(0.5, 0.5))
    augment = AugmentConfig(object_view=object_view)
    config = dataclasses.replace(CONFIG, framing="object", augment=augment)
    (batch,) = global_batches(tar_sources, tokenizer, 1, config=config)
    colored = (batch["image"] < 250).any(axis=-1)
    assert 20 < colored.sum(axis=(1, 2)).mean() <= 36  # 6 x 6 of 12 x 12, noise of any colour
    with evaluation_batches(
        tar_sources["small"],
        None,
        **SHAPE,
        framing="object",
        batch_size=4,
        process_index=0,
        process_count=1,
        num_threads=1,
    ) as batches:
        image = next(batches)["image"][0]
    assert (image[-1] == 255).all()  # 11 of 12 pixels are object
    assert (image[0] < 250).any()


@pytest.fixture
def damaged(tmp_path):
    """Twelve samples, of which number 3 is no picture and number 7 has no caption."""
    members = dict(pairs(0, 12))
    members["s0003.png"] = b"<html>"
    members["s0007.txt"] = b" "
    return WebdatasetSource(str(write_tar(tmp_path / "d.tar", members.items())), tmp_path / "index")


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_are_replaced_the_same_way_everywhere(damaged, tokenizer, caplog, workers):
    config = DataConfig(sources={"s": SourceConfig()}, num_workers=workers)
    whole = global_batches({"s": damaged}, tokenizer, 6, config=config, batch=4)
    texts = [tokenizer.decode(row) for batch in whole for row in batch["tokens"]]
    assert len(texts) == 24
    assert not {"caption 3", "caption 7"} & set(texts)
    halves = global_batches({"s": damaged}, tokenizer, 6, config=config, batch=4, hosts=2)
    assert digest(whole) == digest(halves)
    if not workers:
        assert "bad sample replaced in 's': " in caplog.text
        assert "d.tar, key s0003: cannot decode the image (6 bytes)" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_fail_on_request(damaged, tokenizer, workers):
    config = DataConfig(sources={"s": SourceConfig()}, on_bad_sample="fail", num_workers=workers)
    expected = r"bad sample in data source 's': .*d.tar, key s000(3|7): .*; mend it"
    with pytest.raises(UserError, match=expected) as caught:
        global_batches({"s": damaged}, tokenizer, 3, config=config, batch=4)
    assert "\n" not in str(caught.value)


def test_a_set_of_bad_samples_fails(tmp_path, tokenizer, caplog):
    members = [(name, b"none" if name.endswith("png") else data) for name, data in pairs(0, 5)]
    source = WebdatasetSource(str(write_tar(tmp_path / "a.tar", members)), tmp_path / "index")
    config = DataConfig(sources={"s": SourceConfig()})
    with pytest.raises(UserError, match="101 samples in a row of data source 's' are bad"):
        global_batches({"s": source}, tokenizer, 1, config=config, batch=2)
    assert 5 < len(caplog.records) < 12  # told, not flooded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 52}, "51 samples in all data sources are fewer than global_batch_size 52"),
        ({"batch": 9, "hosts": 2}, "9 is not divisible by 2 processes; nearest: 8 or 10"),
        ({"batch": 3, "hosts": 4}, "3 is not divisible by 4 processes; nearest: 4 or 4"),
    ],
)
def test_mistakes(tar_sources, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        global_batches(tar_sources, tokenizer, 1, **options)


def test_workers_leave_the_accelerator_alone_and_end(tar_sources, tokenizer, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    batches = training_batches(
        dataclasses.replace(CONFIG, num_workers=2),
        tar_sources,
        tokenizer,
        **SHAPE,
        seed=0,
        global_batch_size=8,
        process_index=0,
        process_count=1,
        start_sample=0,
    )
    next(batches)
    assert os.environ["JAX_PLATFORMS"] == "cpu"  # the second worker may still be starting
    next(batches)
    assert os.environ["JAX_PLATFORMS"] == "tpu"
    children = multiprocessing.active_children()
    assert len(children) == 2
    for child in children:
        with open(f"/proc/{child.pid}/environ", "rb") as environment:
            assert b"JAX_PLATFORMS=cpu" in environment.read().split(b"\0")
    batches.close()
    batches.close()
    assert not multiprocessing.active_children()


def test_closing_before_the_first_batch(tar_sources, tokenizer, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    with training_batches(
        dataclasses.replace(CONFIG, num_workers=1),
        tar_sources,
        tokenizer,
        **SHAPE,
        seed=0,
        global_batch_size=8,
        process_index=0,
        process_count=1,
        start_sample=0,
    ):
        pass
    assert os.environ["JAX_PLATFORMS"] == "tpu"
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("hosts", "batch"), [(1, 4), (2, 4), (4, 8), (1, 11), (1, 64)])
def test_evaluation_covers_the_source_once(tar_sources, tokenizer, hosts, batch):
    source = tar_sources["small"]
    seen, lengths = {}, set()
    for host in range(hosts):
        with evaluation_batches(
            source,
            tokenizer,
            **SHAPE,
            batch_size=batch,
            process_index=host,
            process_count=hosts,
            num_threads=2,
        ) as batches:
            parts = list(batches)
        lengths.add(len(parts))
        for part in parts:
            assert part["image"].shape == (batch // hosts, 12, 12, 3)
            assert part["tokens"].shape == (batch // hosts, 8)
            assert (part["index"][~part["mask"]] == -1).all()
            assert not part["image"][~part["mask"]].any()
            for slot in np.flatnonzero(part["mask"]):
                seen[int(part["index"][slot])] = tokenizer.decode(part["tokens"][slot])
    assert lengths == {-(-11 // batch)}
    assert sorted(seen) == list(range(11))
    assert all(seen[row] == "caption " + " ".join(str(100 + row)) for row in seen)


def test_evaluation_without_text(tar_sources):
    with evaluation_batches(
        tar_sources["small"],
        None,
        **SHAPE,
        batch_size=4,
        process_index=0,
        process_count=1,
        num_threads=1,
    ) as batches:
        assert set(next(batches)) == {"image", "mask", "index"}


def test_evaluation_names_a_bad_sample(damaged, tokenizer):
    with (
        evaluation_batches(
            damaged,
            tokenizer,
            **SHAPE,
            batch_size=12,
            process_index=0,
            process_count=1,
            num_threads=1,
        ) as batches,
        pytest.raises(UserError, match=r"in an evaluation set: .*d.tar, key s0003: cannot decode"),
    ):
        next(batches)


def test_captions(tar_sources, damaged):
    assert captions(tar_sources["small"]) == [f"caption {number}" for number in range(100, 111)]
    with pytest.raises(UserError, match="key s0007: no caption"):
        captions(damaged)


def test_training_captions_are_those_of_all_sources(tar_sources):
    texts = list(training_captions(tar_sources))
    assert len(texts) == 51
    assert texts == list(training_captions(dict(reversed(tar_sources.items()))))
