import itertools
import os
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from data.slow_store import slow_store
from data.tars import write_tar

from clip_jax.config.errors import UserError
from clip_jax.config.schema import StreamConfig
from clip_jax.data.stream_buffer import StreamBuffer
from clip_jax.data.streams import SampleStream, StreamedSource, state_width

CONFIG = StreamConfig(num_streams=2, interleave=3, window=10)


def members(tar, count, size=4):
    """`count` samples of which the picture says which one it is; nobody decodes it here."""
    for number in range(count):
        key = f"{tar}-{number:02d}"
        yield f"{key}.jpg", key.encode().ljust(size)
        yield f"{key}.txt", b"a caption"


@pytest.fixture
def source(tmp_path):
    """Nine tars of 4 to 12 samples."""
    tars = [write_tar(tmp_path / f"{n}.tar", members(n, 4 + n)) for n in range(9)]
    return StreamedSource(name="s", tars=tuple(map(str, tars)))


def keys(stream, count, bad=None):
    """The keys of the next samples, read in blocks."""
    found = []
    while len(found) < count:
        block = stream.read_block()
        if bad is not None:
            bad += block.bad
        found += [sample.record.key for sample in block.samples]
    return found[:count]


def stream_of(source, number=0, config=CONFIG, **options):
    return SampleStream(source, number, config=config, seed=0, **({"retries": 0} | options))


def test_every_sample_once_in_each_epoch(source):
    """Streams share the tars out, for good; each shuffles its own anew in every epoch."""
    whole = sorted(f"{tar}-{number:02d}" for tar in range(9) for number in range(4 + tar))
    parts = []
    for number in range(2):
        length = sum(len(block.samples) for block in epoch_of(stream_of(source, number)))
        stream = stream_of(source, number)
        epochs = [keys(stream, length) for _ in range(3)]
        assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
        assert len({tuple(epoch) for epoch in epochs}) == 3
        parts += epochs[0]
    assert sorted(parts) == whole


def epoch_of(stream):
    """The blocks of the epoch: the state says where one ends."""
    while True:
        block = stream.read_block()
        yield block
        if block.end[1] > block.start[1]:
            return


def test_samples_mix_over_tars_and_within_the_window(source):
    first = stream_of(source).read_block()
    tars = [sample.tar for sample in first.samples]
    assert len(first.samples) == 10
    assert Counter(Counter(tars).values()) == {3: 2, 4: 1}  # by turns
    in_turn = stream_of(source, config=StreamConfig(num_streams=2, interleave=3, window=1))
    read = keys(in_turn, 10)
    assert sorted(read) == sorted(sample.record.key for sample in first.samples)
    assert read != [sample.record.key for sample in first.samples]
    assert len({key.split("-")[0] for key in read[:3]}) == 3


def test_seed_and_source_name_matter(source):
    expected = keys(stream_of(source), 20)
    assert keys(stream_of(source), 20) == expected
    assert keys(SampleStream(source, 0, config=CONFIG, seed=1), 20) != expected
    renamed = StreamedSource(name="t", tars=source.tars)
    assert keys(stream_of(renamed), 20) != expected


def damage(source):
    """A tar that is cut short, one that is none, one that is gone, one with bad samples."""
    os.truncate(source.tars[8], 6 * 1024 + 100)
    Path(source.tars[7]).write_bytes(b"<html>")
    os.unlink(source.tars[6])
    lacking = [(name, data) for name, data in members(5, 9) if name != "5-03.txt"]
    write_tar(Path(source.tars[5]), [("._5.jpg", b""), *lacking])


def take(stream, count):
    buffer = StreamBuffer(stream, CONFIG.window, 2**20)
    try:
        taken = [buffer.take().record.key for _ in range(count)]
        return taken, buffer.state(), buffer.drain_bad()
    finally:
        buffer.close()


@pytest.mark.parametrize("damaged", [False, True])
def test_goes_on_exactly(source, damaged):
    """Interrupted anywhere: the same samples, and each bad one counted once."""
    if damaged:
        damage(source)
    for number in range(2):
        whole, last, bad = take(stream_of(source, number), 90)  # more than two epochs
        assert bool(bad) == damaged
        assert (stream_of(source, number, state=last).state() == last).all()
        for count in (*range(24), 37, 60):
            first, state, early = take(stream_of(source, number), count)
            assert state.shape == (state_width(CONFIG),)
            rest, end, late = take(stream_of(source, number, state=state), 90 - count)
            assert first + rest == whole
            assert (end == last).all()
            assert early + late == bad


def test_bad_tars_and_samples_are_passed_over(source):
    damage(source)
    bad, found = [], []
    for number in range(2):
        for block in epoch_of(stream_of(source, number)):
            found += [sample.record.key for sample in block.samples]
            bad += block.bad
    expected = [f"{tar}-{number:02d}" for tar in range(5) for number in range(4 + tar)]
    expected += [f"5-{number:02d}" for number in range(9) if number != 3]
    expected += [f"8-{number:02d}" for number in range(3)]
    assert sorted(found) == expected
    told = sorted((os.path.basename(one.shard), one.reason, one.message[:20]) for one in bad)
    assert told == [
        ("5.tar", "caption", "no txt or json"),
        ("6.tar", "read", "FileNotFoundError: ["),
        ("7.tar", "archive", "the file ends inside"),
        ("8.tar", "archive", "the file ends inside"),
    ]
    assert sum("key 5-03" in one.sample for one in bad) == 1


def test_a_block_ends_at_its_bytes(tmp_path):
    tars = [str(write_tar(tmp_path / f"{n}.tar", members(n, 20, size=1000))) for n in range(2)]
    source = StreamedSource(name="s", tars=tuple(tars))
    stream = stream_of(source, window_bytes=3500)
    assert [len(stream.read_block().samples) for _ in range(5)] == [4] * 5


def test_memory_is_bounded_by_the_window(tmp_path):
    """Reading runs a block ahead of use and no further."""
    size = 50_000
    tars = [str(write_tar(tmp_path / f"{n}.tar", members(n, 20, size))) for n in range(10)]
    config = StreamConfig(num_streams=1, interleave=1, window=10)
    tracemalloc.start()
    try:
        stream = stream_of(StreamedSource(name="s", tars=tuple(tars)), config=config)
        buffer = StreamBuffer(stream, config.window, 2**30)
        for _ in range(25):
            buffer.take()
        time.sleep(0.2)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        buffer.close()
    # Of ten samples, one more that waits, and the tar that is open, of 10 MB in all.
    assert 10 * size < held < (10 + 2 + 20 + 2) * size


def unusable(tmp_path, kind):
    path = tmp_path / f"{kind}.tar"
    if kind == "no captions":
        return write_tar(path, [(f"{n}.jpg", b"") for n in range(1500)])
    if kind == "one without caption":
        return write_tar(path, [("a.jpg", b"")])
    if kind == "no tar":
        path.write_bytes(bytes(range(256)) * 4)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no captions", r"1,000 samples in a row of data source 's' .* no txt or json; check"),
        ("one without caption", r"1 of the stream's 1 tars in a row .* no txt or json; check"),
        ("no tar", "not a tar header"),
        ("gone", "FileNotFoundError"),
    ],
)
def test_nothing_usable_is_an_error(tmp_path, kind, message):
    config = StreamConfig(num_streams=1, interleave=2, window=10)
    source = StreamedSource(name="s", tars=(str(unusable(tmp_path, kind)),))
    buffer = StreamBuffer(stream_of(source, config=config), 10, 2**20)
    for _ in range(2):  # asked again it says so again
        with pytest.raises(UserError, match=message) as caught:
            buffer.take()
        assert "\n" not in str(caught.value)


def test_a_dead_store_is_an_error_in_seconds():
    """Tars fail one after another: only the first of them is tried again."""
    names = [f"{n}.tar" for n in range(50)]
    source = StreamedSource(name="s", tars=tuple(f"slow://{name}" for name in names))
    with slow_store(dict.fromkeys(names, b""), fails=lambda name, start: OSError("down")) as store:
        stream = stream_of(source, config=StreamConfig(num_streams=2), retries=2)
        started = time.monotonic()
        with pytest.raises(UserError, match=r"10 of the stream's 25 tars in a row .*: down"):
            stream.read_block()
        assert time.monotonic() - started < 2
        assert store.num_requests == 12


def test_failures_that_pass_lose_nothing(source):
    files = {os.path.basename(tar): Path(tar).read_bytes() for tar in source.tars}
    remote = StreamedSource(name="s", tars=tuple(f"slow://{name}" for name in files))
    counts: Counter = Counter()

    def every_third(name, start):
        counts[name] += 1
        return TimeoutError("slow down") if counts[name] % 3 == 1 else None

    with slow_store(files):
        expected = keys(stream_of(remote), 60)
    with slow_store(files, fails=every_third):
        bad: list = []
        assert keys(stream_of(remote, retries=1), 60, bad) == expected
        assert sum(counts.values()) > 2 * len(counts)
        assert not bad


@pytest.mark.parametrize("count", [0, 13, 25, 40])
def test_a_pass_of_fewer_samples_than_a_batch_takes(source, count):
    """Told at the end of the first whole pass, wherever the run goes on."""
    length = sum(len(block.samples) for block in epoch_of(stream_of(source)))
    _, state, _ = take(stream_of(source), count)
    assert len(keys(stream_of(source, state=state, rows=length), 100)) == 100
    stream = stream_of(source, state=state, rows=length + 1)
    message = rf"'s' gives {length} samples of 5 tars in stream 0 of 2, fewer than the {length + 1}"
    with pytest.raises(UserError, match=message):
        keys(stream, 100)


def test_too_few_tars(source):
    with pytest.raises(UserError, match=r"'s' has 9 tars for 10 streams.* to 9 or fewer"):
        stream_of(source, config=StreamConfig(num_streams=10))


def test_states_of_another_run_are_refused(source):
    state = stream_of(source).read_block().end
    names = map(os.path.basename, source.tars)
    moved = StreamedSource(name="s", tars=tuple(f"gs://b/{name}" for name in names))
    assert (stream_of(moved, state=state).state() == state).all()
    fewer = StreamedSource(name="s", tars=source.tars[:-1])
    other = StreamConfig(num_streams=2, interleave=3, window=11)
    for options in ({"source": fewer}, {"source": source, "config": other}):
        message = r"'s' .* is not the one that the checkpoint was .* by braces, .* keeps its place"
        with pytest.raises(UserError, match=message):
            stream_of(**options, state=state)
    with pytest.raises(UserError, match="is not the one"):
        stream_of(source, state=state[:-2])


def test_blocks_of_one_come_in_the_order_of_the_tars(source):
    found = keys(stream_of(source, config=StreamConfig(num_streams=1, interleave=1, window=1)), 72)
    assert len(set(found)) == 72
    tars = [tar for tar, _ in itertools.groupby(found, lambda key: key[0])]
    assert sorted(tars) == list("012345678") != tars
    assert found == sorted(found, key=lambda key: (tars.index(key[0]), key))
