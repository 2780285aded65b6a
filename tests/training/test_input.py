"""What the loop reads, from random access and from streams, padded and packed."""

import contextlib
import dataclasses
import json
import shutil

import numpy as np
import pytest
from data.tars import pairs, write_tar
from small import small_config
from training.test_loop import facts

from clip_jax.checkpoint import Workdir, drop_bad_samples_after
from clip_jax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    LoggingConfig,
    PackingConfig,
    SourceConfig,
    StreamConfig,
    TokenizerConfig,
    UserError,
)
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.training.input import (
    TrainingInput,
    describe_sources,
    open_sources,
)
from clip_jax.training.loop import train
from clip_jax.training.measured import count_epochs, keep_measured, measure_packing
from clip_jax.training.resume import check_workdir

NUM_TARS = 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"caption {number}" for number in range(100)], 300, lowercase=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory, tokenizer) -> ExperimentConfig:
    """100 pairs in four tars, of which one picture is broken."""
    folder = tmp_path_factory.mktemp("pairs")
    for tar in range(NUM_TARS):
        members = pairs(25 * tar, 25)
        if tar == 2:
            members[20] = (members[20][0], b"no picture")
        write_tar(folder / f"{tar}.tar", members)
    tokenizer.save(folder / "tokenizer.json")
    small = small_config()
    text = dataclasses.replace(small.model.text, vocab_size=300, eot_id=2)
    return dataclasses.replace(
        small,
        num_steps=6,
        model=dataclasses.replace(small.model, text=text),
        data=DataConfig(
            tokenizer=TokenizerConfig(kind="file", path=str(folder / "tokenizer.json")),
            sources={"pairs": SourceConfig(path=str(folder / "{0..3}.tar"))},
            cache_dir=str(folder / "cache"),
        ),
        checkpoint=CheckpointConfig(every_steps=3),
        logging=LoggingConfig(every_steps=1, tensorboard=False),
    )


def with_data(config: ExperimentConfig, **changes) -> ExperimentConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def streaming(config: ExperimentConfig, **changes) -> ExperimentConfig:
    source = dataclasses.replace(config.data.sources["pairs"], access="stream")
    stream = StreamConfig(num_streams=NUM_TARS, interleave=1, window=8)
    return with_data(config, sources={"pairs": source}, stream=stream, **changes)


@contextlib.contextmanager
def opened(config, tokenizer, tmp_path, *, first_sample=0, saved=None):
    sources = open_sources(config, tmp_path / "cache")
    batches = TrainingInput(
        config,
        sources,
        tokenizer,
        first_sample=first_sample,
        saved=saved or {},
        workdir=Workdir(tmp_path),
    )
    with contextlib.closing(batches):
        yield batches


@pytest.mark.parametrize("kind", ["random", "stream"])
def test_goes_on_where_it_was(config, tokenizer, tmp_path, kind):
    config = config if kind == "random" else streaming(config)
    size = config.global_batch_size
    with opened(config, tokenizer, tmp_path) as batches:
        before, positions = [], []
        for _ in range(6):
            before.append(next(batches))
            positions.append(json.loads(json.dumps(batches.position())))  # as checkpoints keep it
    with opened(config, tokenizer, tmp_path, first_sample=3 * size, saved=positions[2]) as batches:
        for step in range(3, 6):
            np.testing.assert_equal(next(batches), before[step])
            assert batches.position() == positions[step]


def test_a_source_that_has_grown(config, tokenizer, tmp_path):
    saved = {"num_samples": {"pairs": 99, "one that is gone": 7}}
    with (
        pytest.raises(UserError, match=r"'pairs' has 100 samples and had 99 .*allow_config_change"),
        opened(config, tokenizer, tmp_path, saved=saved),
    ):
        pass


@pytest.mark.parametrize("kind", ["random", "stream"])
def test_bad_samples_are_counted_and_written_down(config, tokenizer, tmp_path, kind):
    config = config if kind == "random" else streaming(config)
    with opened(config, tokenizer, tmp_path) as batches:
        for _ in range(4):  # 128 of 100 samples: each has been there
            next(batches)
        figures = batches.figures()
    text = (tmp_path / "bad_samples.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert figures["data/bad_samples"] == figures["data/bad_image"] == len(lines) > 0
    assert figures["data/decode_ms"] > 0
    assert {line["sample"].rsplit("key ")[-1] for line in lines} == {"s0060"}
    assert {line["reason"] for line in lines} == {"image"}


@pytest.mark.parametrize("workers", [0, 1])
def test_what_ends_a_run_is_written_down(config, tokenizer, tmp_path, workers):
    tar = write_tar(tmp_path / "bad.tar", [(name, b"x") for name, _ in pairs(0, 40)])
    sources = {"pairs": SourceConfig(path=str(tar))}
    config = with_data(config, sources=sources, num_workers=workers)
    with opened(config, tokenizer, tmp_path) as batches:
        with pytest.raises(UserError, match=r"101 samples in a row .* \(image: 101\)"):
            next(batches)
        assert batches.place == 0
    lines = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    assert len(lines) == 101


def test_what_the_resumed_run_will_meet_again_is_dropped(tmp_path):
    path = Workdir(tmp_path).bad_samples(3)
    drop_bad_samples_after(path, 31)
    assert not path.exists()
    lines = [json.dumps({"position": position}) + "\n" for position in (1, 40, 31, 12)]
    path.write_text("".join(lines) + '{"position": 2')
    drop_bad_samples_after(path, 31)
    assert path.read_text() == '{"position": 1}\n{"position": 12}\n'


def test_a_range_is_skipped_on_the_way(config, tokenizer, tmp_path):
    """Known only after 64 samples, wherever it lies: nothing comes twice, nothing is left out."""
    size = config.global_batch_size
    with opened(config, tokenizer, tmp_path) as batches:
        before = [next(batches) for _ in range(2)]
        saved = batches.position()
        after = [next(batches) for _ in range(3)]
        assert batches.place == 5 * size
    ranges = ((10, 20), (3 * size, 4 * size))  # one that is over, one to come
    resumed = with_data(config, skipped_ranges=ranges)
    with opened(resumed, tokenizer, tmp_path, first_sample=2 * size, saved=saved) as batches:
        assert batches.place == 2 * size
        np.testing.assert_equal(next(batches), after[0])
        assert batches.place == 4 * size
        saved = batches.position()
        np.testing.assert_equal(next(batches), after[2])
    assert not np.array_equal(before[0]["image"], after[0]["image"])
    with opened(resumed, tokenizer, tmp_path, first_sample=3 * size, saved=saved) as batches:
        np.testing.assert_equal(next(batches), after[2])


def test_rows_of_packed_text_are_measured_once(config, tokenizer, tmp_path):
    config = with_data(config, packing=PackingConfig(group_size=8))
    sources = open_sources(config, tmp_path / "cache")
    measured = measure_packing(config, sources, tokenizer)
    # "caption 12" is four tokens or more with its ends, and rows have eight.
    assert 1 < measured.data.packing.rows <= 8
    assert measure_packing(measured, {}, tokenizer) == measured
    workdir = Workdir(tmp_path)
    assert keep_measured(config, workdir) == config
    given = with_data(config, packing=PackingConfig(group_size=8, rows=7))
    workdir.save_config(given)
    assert keep_measured(config, workdir) == given
    assert keep_measured(measured, workdir) == measured
    other_groups = with_data(config, packing=PackingConfig(group_size=16))
    assert keep_measured(other_groups, workdir) == other_groups
    other_captions = dataclasses.replace(config.data.sources["pairs"], caption_keys=("alt",))
    config = with_data(config, sources={"pairs": other_captions})
    assert keep_measured(config, workdir) == config
    config = with_data(given, packing=PackingConfig(group_size=8))
    with pytest.raises(UserError, match=r"rows must be given where sources stream"):
        measure_packing(streaming(config), {}, tokenizer)


def test_packing_is_chosen_once_and_again_for_more_devices(config, tokenizer, tmp_path):
    text = dataclasses.replace(config.model.text, context_length=16)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
    sources = open_sources(config, tmp_path / "cache")
    chosen = measure_packing(config, sources, tokenizer, num_devices=4).data.packing
    assert chosen.group_size == 8
    assert chosen.rows < 8
    workdir = Workdir(tmp_path)
    started = with_data(config, packing=chosen)
    workdir.save_config(started)
    on_eight = dataclasses.replace(config, mesh=(1, 8, 1))
    # Eight devices that share the batch hold four samples each: no group of eight.
    assert keep_measured(on_eight, workdir).data.packing == PackingConfig()
    assert "data.packing.group_size" in check_workdir(workdir, on_eight, allow_config_change=False)
    on_four = dataclasses.replace(config, mesh=(4, 1, 2))
    assert keep_measured(on_four, workdir).data.packing == chosen
    # A run that was started without keeps to that.
    workdir.save_config(with_data(config, packing=PackingConfig(group_size=0)))
    assert keep_measured(config, workdir).data.packing == PackingConfig(group_size=0)
    none = with_data(config, packing=PackingConfig(group_size=0))
    assert measure_packing(none, {}, tokenizer) == none


def test_sources_in_words(config, tmp_path):
    sources = open_sources(config, tmp_path / "cache")
    assert describe_sources(config, sources) == "100 samples"
    assert describe_sources(streaming(config), {}) == "1 source in 4 streams"


def test_a_run_on_streams_with_packed_text(config, tmp_path):
    """Six steps, and the last three again from the checkpoint between: the same numbers."""
    text = dataclasses.replace(config.model.text, context_length=16)
    model = dataclasses.replace(config.model, text=text)
    config = dataclasses.replace(streaming(config), model=model, global_batch_size=64)
    workdir = Workdir(tmp_path / "run")
    assert train(config, workdir).finished
    whole, bad = facts(workdir), workdir.bad_samples().read_text()
    assert "no picture" not in bad
    assert sum(line["data/bad_samples"] for line in whole) == len(bad.splitlines()) > 0
    shutil.rmtree(workdir.checkpoints / "6")
    assert train(config, workdir).finished
    assert facts(workdir) == whole
    packing = workdir.load_config().data.packing  # chosen: each of eight devices has a group
    assert packing.group_size == 8
    assert packing.rows < 8
    places = [json.loads(line)["position"] for line in bad.splitlines()]
    resumed = workdir.bad_samples().read_text().splitlines()
    assert [json.loads(line)["position"] for line in resumed] == places


def test_epochs_are_counted_once(config, tmp_path):
    """2.5 epochs of 100 samples in batches of 32; the count is kept with the run."""
    asked = dataclasses.replace(
        config,
        num_epochs=2.5,
        schedule=dataclasses.replace(config.schedule, warmup_epochs=1.0),
    )
    sources = open_sources(asked, tmp_path)
    counted = count_epochs(asked, sources)
    assert (counted.epoch_samples, counted.num_steps, counted.schedule.warmup_steps) == (100, 7, 3)
    workdir = Workdir(tmp_path)
    workdir.save_config(counted)
    assert keep_measured(asked, workdir) == counted
    assert count_epochs(counted, {}) == counted
    with pytest.raises(ConfigError, match=r"epoch_samples must be given .* stream"):
        count_epochs(streaming(asked), {})


def test_quarantined_places_are_passed_over(config, tokenizer, tmp_path):
    """The second batch is left out: what comes second was third; places say so."""
    sources = open_sources(config, tmp_path)

    def batches(**options):
        return contextlib.closing(
            TrainingInput(
                config, sources, tokenizer, saved={}, workdir=Workdir(tmp_path), **options
            )
        )

    with batches(first_sample=0) as all_of_them:
        expected = [next(all_of_them) for _ in range(3)]
        assert all_of_them.places(32, 64) == (32, 64)
    with batches(first_sample=0, quarantine=((32, 64),)) as fewer:
        given = [next(fewer) for _ in range(2)]
        assert fewer.places(0, 32) == (0, 32)
        assert fewer.places(32, 64) == (64, 96)
        assert fewer.place == 96
    for ours, theirs in zip(given, (expected[0], expected[2]), strict=True):
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
        np.testing.assert_array_equal(ours["image"], theirs["image"])
