import dataclasses

import pytest
from data.tars import pairs, write_tar

from clip_jax.config import (
    DataConfig,
    ExperimentConfig,
    ImageTowerConfig,
    ModelConfig,
    SourceConfig,
    TextTowerConfig,
    UserError,
)
from clip_jax.data import bench
from clip_jax.data.report import STAGES
from clip_jax.data.sources.webdataset import WebdatasetSource
from clip_jax.data.text_inputs import PaddedText
from clip_jax.data.tokenizers import Tokenizer

CONFIG = ExperimentConfig(
    global_batch_size=8,
    model=ModelConfig(
        image=ImageTowerConfig(image_size=16, patch_size=8), text=TextTowerConfig(context_length=9)
    ),
    data=DataConfig(sources={"a": SourceConfig(path="a.tar")}),
)


@pytest.fixture(scope="module")
def text() -> PaddedText:
    return PaddedText(Tokenizer.train(["caption 1"], 300, lowercase=True), 9)


def opened(folder, members) -> dict[str, WebdatasetSource]:
    return {"a": WebdatasetSource(str(write_tar(folder / "a.tar", members)), folder / "index")}


def test_figures_add_up(tmp_path, text):
    sources = opened(tmp_path, pairs(0, 30))
    alone = bench.time_stages(CONFIG, sources, text, seconds=0.05)
    assert alone.num_samples % 64 == 0
    assert alone.num_samples > 0
    assert alone.num_bad == 0
    assert tuple(alone.stages) == STAGES
    assert all(stage.wall > 0 for stage in alone.stages.values())
    total = sum(stage.wall for stage in alone.stages.values())
    assert alone.wall_ms * alone.num_samples == pytest.approx(1000 * total)
    whole = bench.time_end_to_end(CONFIG, sources, text, seconds=60, num_batches=5)
    assert (whole.num_samples, whole.batch_size) == (40, 8)
    assert whole.samples_per_second == 40 / whole.seconds
    assert {f"data/{stage}_ms" for stage in STAGES} <= whole.figures.keys()


def test_seconds_end_it(tmp_path, text):
    rates = []
    sources = opened(tmp_path, pairs(0, 30))
    whole = bench.time_end_to_end(CONFIG, sources, text, seconds=0.1, progress=rates.append)
    assert 0.1 <= whole.seconds < 20
    assert whole.num_samples == 8 * len(rates)
    assert rates[-1] == pytest.approx(whole.samples_per_second, rel=0.1)


def test_bad_samples_are_counted(tmp_path, text):
    members = [m for n, m in enumerate(pairs(0, 20)) if n]  # the first has no picture: left out
    members[0:0] = [("bad.png", b"no picture"), ("bad.txt", b"x")]
    alone = bench.time_stages(CONFIG, opened(tmp_path, members), text, seconds=0)
    assert alone.num_samples + alone.num_bad == 64
    assert 1 <= alone.num_bad <= 4  # of 20, three or four times
    members = [m for n in range(8) for m in ((f"{n}.png", b"x"), (f"{n}.txt", b"x"))]
    with pytest.raises(UserError, match="the first 64 samples of the run are all bad"):
        bench.time_stages(CONFIG, opened(tmp_path / "all", members), text, seconds=0)


def result(wall: dict[str, float], rate: float, num_threads: int = 2):
    """Figures of 1000 samples; reading takes no processor time, the rest all of it."""
    stages = {
        stage: bench.StageTime(wall[stage], 0.001 if stage == "read" else wall[stage])
        for stage in STAGES
    }
    config = dataclasses.replace(
        CONFIG, data=dataclasses.replace(CONFIG.data, num_threads=num_threads)
    )
    figures = {f"data/{stage}_ms": 1.0 for stage in STAGES} | {"data/bad_samples": 3.0}
    whole = bench.EndToEnd(int(10 * rate), 10.0, 256, figures)
    return config, bench.StagesAlone(1000, 0, stages), whole


def test_advice_names_the_stage_that_limits(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    times = {"read": 0.2, "decode": 0.7, "tokenize": 0.1, "batch": 0.1}
    config, alone, whole = result(times, rate=2000)
    lines = bench.advice(config, alone, whole, target=10_000)
    assert lines[0].startswith("decode limits: 64%")
    assert "2 threads leave cores idle; there are 4" in lines
    # 0.901 ms of a core and 1.1 ms of a thread for each sample.
    assert "10,000 samples/s take 10 cores and 11 threads" in lines[-1]
    text = bench.table(config, alone, whole, 10_000)
    assert "2,000 samples/s (20,000 samples in batches of 256)" in text
    assert "bad samples 3" in text
    assert all(line in text for line in lines)
    assert [line.split()[-1] for line in text.splitlines()[2:7]] == [
        *("0.01", "7.00", "1.00", "1.00", "9.01")
    ]


def test_advice_on_slow_storage_and_busy_threads(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    times = {"read": 5.0, "decode": 0.7, "tokenize": 0.1, "batch": 0.1}
    config, alone, whole = result(times, rate=330)
    lines = bench.advice(config, alone, whole, target=None)
    assert lines[0].startswith("waiting for storage limits: 85%")
    assert "more data.num_threads wait for more samples at a time" in lines
    times["read"] = 0.02
    config, alone, whole = result(times, rate=500)
    lines = bench.advice(config, alone, whole, target=None)
    assert any("2 threads on 4 cores promise 2,174 samples/s" in line for line in lines)


def test_streams_have_no_stages_alone():
    config, _, whole = result(dict.fromkeys(STAGES, 1.0), rate=100)
    text = bench.table(config, None, whole, None)
    assert text.startswith("end to end, 2 threads")
