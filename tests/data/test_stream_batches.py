import contextlib
import dataclasses
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
from data.slow_store import slow_store
from data.tars import pairs, write_tar

from clip_jax.config.errors import UserError
from clip_jax.config.schema import (
    AugmentConfig,
    DataConfig,
    ImageTowerConfig,
    PackingConfig,
    SourceConfig,
    StreamConfig,
)
from clip_jax.data.stream_batches import _split, local_streams, stream_batches
from clip_jax.data.text_inputs import PackedText, PaddedText
from clip_jax.data.tokenizers import Tokenizer

IMAGE = ImageTowerConfig(image_size=12, patch_size=4)
STREAM = StreamConfig(num_streams=4, interleave=2, window=6)
SIZES = {"large": [7, 5, 9, 6, 8, 5], "small": [4, 3, 4, 3]}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([f"caption {number}" for number in range(300)], 300, lowercase=True)


@pytest.fixture(scope="module")
def text(tokenizer):
    return PaddedText(tokenizer, 8)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two sources, of 40 and 14 samples, three to one; captions are numbered from 0 and 200 on."""
    folder = tmp_path_factory.mktemp("streams")
    for name, sizes in SIZES.items():
        first = 0 if name == "large" else 200
        for number, size in enumerate(sizes):
            write_tar(folder / f"{name}-{number}.tar", pairs(first, size))
            first += size
    return DataConfig(
        sources={
            name: SourceConfig(access="stream", path=f"{folder}/{name}-*.tar", weight=weight)
            for name, weight in {"small": 1.0, "large": 3.0}.items()
        },
        augment=AugmentConfig(crop_scale=(0.4, 1.0), horizontal_flip=0.5),
        stream=STREAM,
        num_threads=1,
    )


def open_batches(config, text, *, host=0, hosts=1, states=None, start=0, batch=8, seed=0):
    if states is not None:
        mine = local_streams(len(states), host, hosts)
        states = states[mine.start : mine.stop]
    return stream_batches(
        config,
        text,
        image=IMAGE,
        seed=seed,
        global_batch_size=batch,
        process_index=host,
        process_count=hosts,
        states=states,
        start_sample=start,
    )


def global_batches(config, text, count, *, hosts=1, **options):
    """The next batches of all hosts, put together, the states of all streams, what was bad."""
    with contextlib.ExitStack() as stack:
        iterators = [
            stack.enter_context(open_batches(config, text, host=host, hosts=hosts, **options))
            for host in range(hosts)
        ]
        batches = []
        for _ in range(count):
            parts = [next(iterator) for iterator in iterators]
            batches.append({name: np.concatenate([p[name] for p in parts]) for name in parts[0]})
        states = np.concatenate([iterator.states() for iterator in iterators])
        bad = [one for iterator in iterators for one in iterator.drain_bad_samples()]
        return batches, states, bad


def digest(batches):
    digests = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digests.update(batch[name].tobytes())
    return digests.hexdigest()


def numbers(batches, tokenizer):
    """Which samples the batches hold, by their captions."""
    words = [tokenizer.decode(row) for batch in batches for row in batch["tokens"]]
    return [int("".join(word.split()[1:])) for word in words]


@pytest.fixture(scope="module")
def expected(config, text):
    return global_batches(config, text, 16)


def test_what_a_batch_holds(config, text):
    (batch,), _, _ = global_batches(config, text, 1)
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "image": (np.uint8, (8, 12, 12, 3)),
        "tokens": (np.int32, (8, 8)),
    }


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts(config, text, expected, hosts):
    batches, states, _ = global_batches(config, text, 16, hosts=hosts)
    assert digest(batches) == digest(expected[0])
    assert (states == expected[1]).all()


@pytest.mark.parametrize("threads", [0, 3])
def test_any_number_of_threads(config, text, expected, threads):
    config = dataclasses.replace(config, num_threads=threads, prefetch_batches=3)
    assert digest(global_batches(config, text, 16)[0]) == digest(expected[0])


def test_workers(config, text, expected):
    """Three for four streams; that one worker is as good shows below."""
    config = dataclasses.replace(config, num_workers=3)
    batches, states, _ = global_batches(config, text, 16)
    assert digest(batches) == digest(expected[0])
    assert (states == expected[1]).all()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 11])
def test_goes_on_exactly_on_any_number_of_hosts(config, text, expected, count):
    first, states, _ = global_batches(config, text, count, hosts=2)
    for hosts in (1, 4):
        rest, end, _ = global_batches(
            config, text, 16 - count, hosts=hosts, states=states, start=8 * count
        )
        assert digest(first + rest) == digest(expected[0])
        assert (end == expected[1]).all()


def test_every_pair_once_in_each_epoch_of_its_stream(config, tokenizer, expected):
    """Row r of a batch comes from stream r // 2; sources mix three to one in each stream."""
    rows = np.array(numbers(expected[0], tokenizer)).reshape(16, 4, 2)
    seen = []
    for stream in range(4):
        mine = rows[:, stream].ravel()
        assert sum(mine >= 200) == 8  # of 32
        for source in (mine[mine < 200], mine[mine >= 200]):
            epoch = len(set(source.tolist()))
            assert len(source) > epoch  # it comes round
            assert len(set(source[:epoch].tolist())) == epoch
            counts = Counter(source.tolist()).values()
            assert max(counts) - min(counts) <= 1
            seen += set(source.tolist())
    assert sorted(seen) == [*range(40), *range(200, 214)]


def test_another_batch_size_is_the_same_streams(config, tokenizer, text, expected):
    small = np.array(numbers(expected[0], tokenizer)).reshape(16, 4, 2)
    batches, _, _ = global_batches(config, text, 4, batch=32)
    large = np.array(numbers(batches, tokenizer)).reshape(4, 4, 8)
    for stream in range(4):
        assert (small[:, stream].ravel() == large[:, stream].ravel()).all()


def test_seed_matters(config, text, expected):
    assert digest(global_batches(config, text, 16, seed=1)[0]) != digest(expected[0])


def test_skipped_ranges(config, tokenizer, text, expected):
    """Whole batches and odd places: place p is place p // 4 of stream p % 4."""
    skipping = dataclasses.replace(config, skipped_ranges=((16, 32), (49, 50)))
    batches, states, _ = global_batches(skipping, text, 10)
    assert digest(batches[:2]) == digest(expected[0][:2])
    assert digest(batches[2:4]) == digest(expected[0][4:6])
    whole = np.array(numbers(expected[0], tokenizer)).reshape(16, 4, 2)
    found = np.array(numbers(batches, tokenizer)).reshape(10, 4, 2)
    for stream in range(4):
        kept = np.delete(whole[:, stream].ravel(), range(4, 8))
        if stream == 49 % 4:
            kept = np.delete(kept, 49 // 4 - 4)
        assert (found[:, stream].ravel() == kept[:20]).all()
    first, middle, _ = global_batches(skipping, text, 4)
    rest, end, _ = global_batches(skipping, text, 6, states=middle, start=32)
    assert digest(first + rest) == digest(batches)
    assert (end == states).all()


@pytest.fixture
def damaged(tmp_path):
    """Four tars of nine samples: two do not decode, one has no caption, one tar is cut short."""
    for number in range(4):
        members = dict(pairs(9 * number, 9))
        if number == 1:
            members["s0010.png"] = members["s0011.png"] = b"<html>"
        if number == 2:
            members["s0020.txt"] = b" "
        write_tar(tmp_path / f"{number}.tar", members.items())
    os.truncate(tmp_path / "3.tar", 5 * 2560 + 100)
    path = f"{tmp_path}/*.tar"
    return DataConfig(
        sources={"s": SourceConfig(access="stream", path=path)},
        stream=dataclasses.replace(STREAM, num_streams=2),
    )


def test_bad_samples_are_passed_over_and_counted_once(damaged, tokenizer, text):
    whole, end, bad = global_batches(damaged, text, 8, batch=4)
    assert not {10, 11, 20} & set(numbers(whole, tokenizer))
    assert Counter(one["reason"] for one in bad)["image"] >= 2
    assert {one["reason"] for one in bad} == {"image", "caption", "archive"}
    named = {one["sample"].split(", key ")[-1] for one in bad if one["reason"] != "archive"}
    assert named == {"s0010", "s0011", "s0020"}
    assert all(0 <= one["position"] < 32 for one in bad)

    def told(bad):
        return Counter((one["sample"], one["position"], one["reason"]) for one in bad)

    halves, _, bad_of_halves = global_batches(damaged, text, 8, batch=4, hosts=2)
    assert digest(halves) == digest(whole)
    assert told(bad_of_halves) == told(bad)
    for count in range(1, 8):
        first, states, early = global_batches(damaged, text, count, batch=4)
        rest, last, late = global_batches(
            damaged, text, 8 - count, batch=4, states=states, start=4 * count
        )
        assert digest(first + rest) == digest(whole)
        assert (last == end).all()
        assert told(early + late) == told(bad)


def test_bad_samples_fail_on_request(damaged, text):
    config = dataclasses.replace(damaged, on_bad_sample="fail")
    with pytest.raises(UserError, match=r"bad sample in data source 's': .*; mend it, or"):
        global_batches(config, text, 12, batch=4)


@pytest.mark.parametrize("workers", [0, 1])
def test_only_bad_pictures_are_an_error(tmp_path, text, workers):
    members = [(name, b"none" if name.endswith("png") else data) for name, data in pairs(0, 8)]
    write_tar(tmp_path / "a.tar", members)
    config = DataConfig(
        sources={"s": SourceConfig(access="stream", path=str(tmp_path / "a.tar"))},
        stream=StreamConfig(num_streams=1, interleave=2, window=4),
        num_workers=workers,
    )
    with (
        open_batches(config, text) as batches,
        pytest.raises(
            UserError,
            match=r"101 samples in a row of data source 's' are bad \(image: 101\), the last",
        ),
    ):
        next(batches)


def stored(config):
    """The files of a config's sources by their base names."""
    folder = Path(config.sources["large"].path).parent
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def in_store(config, protocol, **changes):
    """The config with its sources in a store."""
    sources = {
        name: dataclasses.replace(
            source, path=f"{protocol}://{name}-{{0..{len(SIZES[name]) - 1}}}.tar"
        )
        for name, source in config.sources.items()
    }
    return dataclasses.replace(config, sources=sources, **changes)


def test_a_store_gives_what_the_disk_gives(config, text, expected):
    memory = fsspec.filesystem("memory")
    for name, content in stored(config).items():
        memory.pipe_file(f"/{name}", content)
    try:
        batches, states, _ = global_batches(in_store(config, "memory"), text, 16)
    finally:
        memory.store.clear()
    assert digest(batches) == digest(expected[0])
    assert (states == expected[1]).all()


def test_slow_storage_is_read_ahead(config, text, expected):
    """Streams and sources wait for their store at the same time, and while batches are used."""
    remote = in_store(config, "slow")
    with slow_store(stored(config), seconds=0.1) as store, open_batches(remote, text) as batches:
        store.most_in_flight = 0
        found = [next(batches)]
        assert store.most_in_flight == 8
        time.sleep(0.6)
        start = time.perf_counter()
        found.append(next(batches))
        assert time.perf_counter() - start < 0.1
    assert digest(found) == digest(expected[0][:2])


def test_a_store_that_fails_now_and_then(config, text, expected):
    lock, counts = threading.Lock(), Counter()

    def every_fifth(name, start):
        with lock:
            counts[name] += 1
            return ConnectionError("reset") if counts[name] % 5 == 3 else None

    with slow_store(stored(config), fails=every_fifth):
        batches, states, bad = global_batches(in_store(config, "slow"), text, 16)
    assert max(counts.values()) >= 5
    assert not bad
    assert digest(batches) == digest(expected[0])
    assert (states == expected[1]).all()


def test_tars_that_vanish_in_the_middle(config, tokenizer, text):
    """What is gone is told once an epoch; a run that goes on does not mind its absence."""
    files = stored(config)
    remote = in_store(
        config, "slow", read_retries=0, stream=dataclasses.replace(STREAM, num_streams=2)
    )
    remote = dataclasses.replace(remote, sources={"large": remote.sources["large"]})
    gone = {"slow://large-1.tar", "slow://large-4.tar"}
    with slow_store(files):
        with open_batches(remote, text, batch=4) as batches:
            next(batches)
            states = batches.states()
            for name in gone:
                del files[name.removeprefix("slow://")]
            for _ in range(30):
                next(batches)
            bad = batches.drain_bad_samples()
        again, _, _ = global_batches(remote, text, 20, batch=4, states=states, start=4)
    assert {one["shard"] for one in bad} == gone
    assert {one["message"] for one in bad} >= {"FileNotFoundError: large-1.tar"}
    assert {one["reason"] for one in bad} == {"read"}
    assert set(numbers(again[8:], tokenizer)) == {*range(7), *range(12, 27), *range(35, 40)}


def test_what_is_waited_for_is_named(config, text):
    remote = in_store(config, "slow")
    with slow_store(stored(config), seconds=0.5), open_batches(remote, text) as batches:
        time.sleep(0.1)
        words = batches._pieces.describe(0)
        assert words.startswith("streams 0 to 3, batch 0 since the start; in hand: slow://large-")
        assert words.count("slow://") == 8


def test_uneven_streams_are_warned_of(config, text, caplog):
    three = dataclasses.replace(config, stream=dataclasses.replace(STREAM, num_streams=3))
    with open_batches(three, text, batch=6):
        pass
    (record,) = caplog.records
    assert "'small' has 4 tars for 3 streams, 1 or 2 each" in record.getMessage()


def test_going_on_without_a_local_tar(damaged, text):
    braces = damaged.sources["s"].path.replace("*", "{0..3}")
    config = dataclasses.replace(
        damaged, sources={"s": dataclasses.replace(damaged.sources["s"], path=braces)}
    )
    _, states, _ = global_batches(config, text, 1, batch=4)
    os.unlink(braces.replace("{0..3}", "2"))
    with pytest.raises(UserError, match="1 of 4 files"):
        open_batches(config, text, batch=4)
    _, _, bad = global_batches(config, text, 8, batch=4, states=states, start=4)
    assert "read" in {one["reason"] for one in bad}


def test_a_killed_worker_is_an_error(config, text):
    config = dataclasses.replace(config, num_workers=1, prefetch_batches=1)
    with open_batches(config, text) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="a worker process that makes batches was killed"):
            list(itertools.islice(batches, 10))
    assert not multiprocessing.active_children()


def test_threads_end(config, text):
    before = set(threading.enumerate())
    for count in (0, 1):
        with open_batches(config, text) as batches:
            for _ in range(count):
                next(batches)
        batches.close()
    deadline = time.monotonic() + 5
    while left := set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def test_packed_captions(config, tokenizer):
    packed = PackedText(tokenizer, 8, 4, 3)
    config = dataclasses.replace(config, packing=PackingConfig(group_size=4, rows=3))
    batches, _, _ = global_batches(config, packed, 3)
    assert digest(batches) == digest(global_batches(config, packed, 3, hosts=2)[0])
    assert batches[0]["tokens"].shape == (2, 3, 8)
    workers = dataclasses.replace(config, num_workers=2)
    assert digest(batches) == digest(global_batches(workers, packed, 3)[0])


@pytest.mark.parametrize(
    ("streams", "rows", "group", "workers", "expected"),
    [
        (range(4), 2, 1, 0, [range(4)]),
        (range(4), 2, 1, 3, [range(1), range(1, 2), range(2, 4)]),
        (range(4), 2, 4, 3, [range(2), range(2, 4)]),
        (range(8, 12), 3, 4, 3, [range(8, 12)]),
        (range(6), 4, 4, 9, [range(n, n + 1) for n in range(6)]),
    ],
)
def test_groups_of_captions_do_not_lie_across_workers(streams, rows, group, workers, expected):
    assert _split(streams, rows, group, workers) == expected


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"hosts": 3}, "num_streams 4 is not divisible by 3 processes; nearest: 3 or 6"),
        ({}, {"batch": 10}, "10 is not divisible by data.stream.num_streams 4; nearest: 8 or 12"),
        ({"stream": StreamConfig(num_streams=5)}, {"batch": 10}, "'small' has 4 tars for 5"),
        ({}, {"start": 8}, "the checkpoint at 8 samples has no states of streams"),
        ({}, {"states": np.zeros((4, 5), np.int64)}, r"\(4, 5\), not \(4, 21\)"),
        ({}, {"states": np.zeros((4, 21), np.int64)}, r"'large' \(6 tars\) is not the one"),
    ],
)
def test_mistakes(config, text, changes, options, message):
    with pytest.raises(UserError, match=message) as caught:
        open_batches(dataclasses.replace(config, **changes), text, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("batch", "fits"), [(16, True), (24, False)])
def test_a_batch_holds_no_sample_of_a_source_twice(config, text, batch, fits):
    """A stream has 3 or 4 samples of 'small', of which 3/4 of its 4 or 6 rows of a batch are."""
    sources = {
        name: dataclasses.replace(source, weight={"small": 3.0, "large": 1.0}[name])
        for name, source in config.sources.items()
    }
    changed = dataclasses.replace(config, sources=sources)
    if fits:
        global_batches(changed, text, 3, batch=batch)
        return
    with pytest.raises(UserError, match=r"'small' gives 3 samples of 1 tars .* fewer than the 4"):
        global_batches(changed, text, 3, batch=batch)


def test_sources_of_both_kinds_are_refused(config, text):
    sources = dict(config.sources)
    sources["small"] = dataclasses.replace(sources["small"], access="random")
    with pytest.raises(UserError, match=r"sources.small.access is 'random' and others stream"):
        open_batches(dataclasses.replace(config, sources=sources), text)


def test_figures(config, text):
    with open_batches(config, text) as batches:
        next(batches)
        next(batches)
        figures = batches.stats()
    assert figures["data/bad_samples"] == 0
    assert all(figures[f"data/{stage}_ms"] > 0 for stage in ("read", "decode", "tokenize", "batch"))
