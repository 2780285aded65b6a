import collections
import dataclasses
import pickle
import re
import time

import numpy as np
import pytest
from data.batches import (
    CONFIG,
    CONTEXT_LENGTH,
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

from clip_jax.config.errors import UserError
from clip_jax.config.schema import AugmentConfig, DataConfig, ObjectViewConfig, SourceConfig
from clip_jax.data.host_batches import EvaluationBatches, TrainingBatches
from clip_jax.data.pipeline import sample_keys
from clip_jax.data.record import BadSampleError, Record
from clip_jax.data.sources.webdataset import WebdatasetSource
from clip_jax.data.text_inputs import PackedText


@pytest.fixture(scope="module")
def tokenizer(tar_sources):
    return small_tokenizer(tar_sources)


@pytest.fixture(scope="module")
def text(tokenizer):
    return padded_text(tokenizer)


def one_host(sources, text, *, config=ONE, batch=8):
    return TrainingBatches(
        config,
        sources,
        text,
        image=IMAGE,
        seed=0,
        global_batch_size=batch,
        process_index=0,
        process_count=1,
        start_sample=0,
    )


def read(source, tokenizer, **options):
    """The batches of one host over an evaluation set."""
    options = {"batch_size": 8, "framing": "crop", "process_index": 0, "process_count": 1} | options
    options = {"image": IMAGE, "context_length": CONTEXT_LENGTH, "num_threads": 2} | options
    batches = EvaluationBatches(source, tokenizer, **options)
    return [batches[index][0] for index in range(len(batches))]


class CaptionsOnly:
    """A source whose only sample has some captions with weights."""

    def __init__(self, captions, weights):
        self._record = Record(png(0), captions, "k", weights)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self._record

    def shard(self, index):
        return "memory"


@pytest.mark.parametrize(
    ("weights", "options", "low", "high"),
    [
        ((), {"captions": "first"}, 200, 200),
        ((), {}, 70, 130),
        ((), {"first_caption": 0.0}, 0, 0),
        ((), {"first_caption": 0.8}, 140, 180),
        ((), {"first_caption": 1.0}, 200, 200),
        ((4.0, 1.0), {}, 140, 180),
        ((0.0, 3.0), {"captions": "first"}, 0, 0),
        ((3.0, 0.0), {}, 200, 200),
    ],
)
def test_share_of_the_first_caption(tokenizer, text, weights, options, low, high):
    source = CaptionsOnly(("caption 1", "caption 2"), weights)
    config = DataConfig(sources={"s": SourceConfig(**options)})
    batch, _ = one_host({"s": source}, text, config=config, batch=200)[0]
    texts = [tokenizer.decode(row) for row in batch["tokens"]]
    assert set(texts) <= {"caption 1", "caption 2"}
    assert low <= texts.count("caption 1") <= high


def test_framing_object(tar_sources, text):
    object_view = ObjectViewConfig(scale=(0.5, 0.5))
    augment = AugmentConfig(object_view=object_view)
    config = dataclasses.replace(CONFIG, framing="object", augment=augment)
    batch, _ = one_host(tar_sources, text, config=config)[0]
    colored = (batch["image"] < 250).any(axis=-1)
    assert 20 < colored.sum(axis=(1, 2)).mean() <= 36  # 6 x 6 of 12 x 12, noise of any colour
    image = read(tar_sources["small"], None, framing="object")[0]["image"][0]
    assert (image[-1] == 255).all()  # 11 of 12 pixels are object
    assert (image[0] < 250).any()


def test_packed_text(tar_sources, tokenizer):
    text = PackedText(tokenizer, context_length=12, group_size=4, rows=1)
    batch, report = one_host(tar_sources, text, config=CONFIG)[0]
    assert {name: array.shape for name, array in batch.items() if name != "image"} == {
        "tokens": (2, 1, 12),
        "segments": (2, 1, 12),
        "eot": (2, 4),
        "text_id": (8,),
    }
    assert report.num_cut_captions > 0


@pytest.fixture
def damaged(tmp_path):
    """Twelve samples, of which number 3 is no picture and number 7 has no caption."""
    members = dict(pairs(0, 12))
    members["s0003.png"] = b"<html>"
    members["s0007.txt"] = b" "
    return WebdatasetSource(str(write_tar(tmp_path / "d.tar", members.items())), tmp_path / "index")


class Intact(CaptionsOnly):
    """A source as long as another, of which all samples can be read; their keys are numbers."""

    def __init__(self, other):
        self._length = len(other)

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return Record(b"", ("",), str(index))


@pytest.mark.parametrize(("hosts", "workers"), [(1, 0), (2, 0), (1, 1)])
def test_bad_samples_are_replaced_and_counted(damaged, tokenizer, text, caplog, hosts, workers):
    config = dataclasses.replace(ONE, num_workers=workers)
    batches, bad, totals = [], [], collections.Counter()
    for host in range(hosts):
        options = {"config": config, "batch": 4, "host": host, "hosts": hosts}
        with host_batches({"s": damaged}, text, **options) as iterator:
            batches.append([next(iterator) for _ in range(6)])
            bad += iterator.drain_bad_samples()
            totals.update(iterator.stats())
    parts = [host[index]["tokens"] for index in range(6) for host in batches]
    texts = [tokenizer.decode(row) for row in np.concatenate(parts)]
    assert len(texts) == 24
    assert not {"caption 3", "caption 7"} & set(texts)
    # Both come once in each of the two epochs, and three times in place of another one.
    keys = sample_keys(config, {"s": Intact(damaged)}, seed=0, positions=range(24))
    places = {place for place, key in enumerate(keys) if key in ("s/3", "s/7")}
    assert {sample["position"] for sample in bad} == places
    reasons = collections.Counter(sample["reason"] for sample in bad)
    assert reasons == {"image": 3, "caption": 4}
    counts = {name: count for name, count in totals.items() if not name.endswith("_ms") and count}
    assert counts == {
        "data/bad_samples": 7,
        "data/bad_image": 3,
        "data/bad_caption": 4,
        "data/bad_shards": hosts,
    }
    assert {(sample["source"], sample["shard"]) for sample in bad} == {("s", damaged.shard(0))}
    assert "bad sample replaced in 's': " in caplog.text
    assert "d.tar, key s0003: cannot decode the image (6 bytes)" in caplog.text


def test_replacements_do_not_depend_on_the_batch(damaged, text):
    whole = global_batches({"s": damaged}, text, 3, config=ONE, batch=8)
    parts = global_batches({"s": damaged}, text, 6, config=ONE, batch=4, hosts=2)
    assert (joined(whole, "image") == joined(parts, "image")).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_fail_on_request(damaged, text, workers):
    config = dataclasses.replace(ONE, on_bad_sample="fail", num_workers=workers)
    expected = r"bad sample in data source 's': .*d.tar, key s000(3|7): .*; mend it"
    with pytest.raises(UserError, match=expected) as caught:
        global_batches({"s": damaged}, text, 3, config=config, batch=4)
    assert "\n" not in str(caught.value)


class Failing(CaptionsOnly):
    """A source that cannot be read, in different ways."""

    def __init__(self, *errors):
        super().__init__(("caption",), ())
        self._errors = errors

    def __len__(self):
        return len(self._errors)

    def __getitem__(self, index):
        raise self._errors[index]

    def locate(self, index):
        return f"sample number {index}"


def test_a_set_of_bad_samples_fails(text):
    source = Failing(OSError("gone"), ValueError("torn"), BadSampleError("caption", "none"))
    with pytest.raises(UserError) as caught:
        one_host({"s": source}, text)[0]
    message = str(caught.value)
    assert message.startswith("101 samples in a row of data source 's' are bad (")
    counts = dict(re.findall(r"(read|archive|caption): (\d+)", message))
    assert len(counts) == 3
    assert sum(map(int, counts.values())) == 101
    last = {"gone": "memory, sample 0", "torn": "sample number 1", "none": "sample number 2"}
    assert any(f"the last: {sample}: {error};" in message for error, sample in last.items())


class Dead(Failing):
    """A source that takes its time to say that it cannot be read."""

    def __init__(self, reason, seconds):
        super().__init__(BadSampleError(reason, "no answer"))
        self._seconds = seconds
        self.num_reads = 0

    def __getitem__(self, index):
        self.num_reads += 1
        time.sleep(self._seconds)
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("limit", "reason", "seconds", "least", "most"),
    [
        (0.1, "read", 0.03, 3, 4),
        (0.1, "read", 0.2, 3, 3),
        (30.0, "read", 0, 101, 101),
        (0.0, "archive", 0, 101, 101),
    ],
)
def test_a_dead_store_ends_the_run(text, monkeypatch, limit, reason, seconds, least, most):
    monkeypatch.setattr("clip_jax.data.host_batches._MAX_READING_SECONDS", limit)
    source = Dead(reason, seconds)
    config = dataclasses.replace(ONE, num_threads=0)
    with pytest.raises(UserError) as caught:
        one_host({"s": source}, text, config=config)[0]
    count = source.num_reads
    assert least <= count <= most
    start = f"{count} samples in a row of data source 's' are bad ({reason}: {count}), the last: "
    assert str(caught.value).startswith(start)


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("error", [KeyError("unexpected"), RecursionError("too deep")])
def test_an_unexpected_error_comes_as_itself(text, threads, error):
    config = dataclasses.replace(ONE, num_threads=threads)
    source = Failing(*[error] * 8)
    with (
        host_batches({"s": source}, text, config=config) as batches,
        pytest.raises(type(error), match=str(error.args[0])),
    ):
        next(batches)


@pytest.mark.parametrize("threads", [0, 2, 5])
def test_a_report_does_not_depend_on_the_threads(damaged, text, threads):
    config = dataclasses.replace(ONE, num_threads=threads)
    start = time.perf_counter()
    _, report = one_host({"s": damaged}, text, config=config, batch=24)[0]
    seconds = time.perf_counter() - start
    assert report.num_samples == 24
    positions = [bad.position for bad in report.bad_samples]
    assert positions == sorted(positions)
    assert collections.Counter(bad.reason for bad in report.bad_samples) == {
        "image": 3,
        "caption": 4,
    }
    stages = [report.read, report.decode, report.tokenize, report.batch]
    assert all(stage > 0 for stage in stages)
    if not threads:
        assert sum(stages) <= seconds


def test_a_missing_package_is_no_bad_sample(text):
    with pytest.raises(UserError, match="install it"):
        one_host({"s": Failing(UserError("install it"))}, text)[0]


@pytest.mark.parametrize(("hosts", "batch"), [(1, 4), (2, 4), (4, 8), (1, 11), (1, 64)])
def test_evaluation_covers_the_source_once(tar_sources, tokenizer, hosts, batch):
    source = tar_sources["small"]
    seen, lengths = {}, set()
    for host in range(hosts):
        options = {"batch_size": batch, "process_index": host, "process_count": hosts}
        parts = read(source, tokenizer, **options)
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


def test_naflex_evaluation(tar_sources, tokenizer):
    naflex = dataclasses.replace(IMAGE, kind="naflex", max_num_patches=10)
    first, last = read(tar_sources["small"], tokenizer, image=naflex)
    assert (first["spatial_shapes"] == 3).all()
    assert last["mask"].tolist() == [True] * 3 + [False] * 5
    assert (last["patch_mask"].sum(axis=1) == [9] * 3 + [1] * 5).all()
    assert (last["spatial_shapes"][3:] == 1).all()
    assert not last["patches"][3:].any()


def test_evaluation_names_a_bad_sample(damaged, tokenizer):
    with pytest.raises(UserError, match=r"in an evaluation set: .*d.tar, key s0003: cannot decode"):
        read(damaged, tokenizer)


def test_batches_say_what_they_are(tar_sources, text):
    batches = one_host(tar_sources, text, config=CONFIG)
    assert batches.describe(2) == "samples 16 to 23 of the run"
    assert digest([batches[1][0]]) == digest([pickle.loads(pickle.dumps(batches))[1][0]])
