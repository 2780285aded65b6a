import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data.tars import pairs, png, write_tar
from data.test_array_record import write as write_array_record
from data.test_arrow_files import write as write_arrow
from data.test_folder import fill
from data.test_tf_example import serialised
from data.test_tfds import F, prepare

from clip_jax.config.errors import UserError
from clip_jax.config.schema import DataConfig, EvalSetConfig, SourceConfig
from clip_jax.data.sources import cache_dir, open_source

LABELLED = ("folder", "parquet", "tfds")


@pytest.fixture
def configs(tmp_path, monkeypatch) -> dict[str, SourceConfig]:
    """A set of three samples of every kind; `LABELLED` ones have classes instead of captions."""
    images, captions = [png(n) for n in range(3)], [f"caption {n}" for n in range(3)]
    write_tar(tmp_path / "a.tar", pairs(0, 3))
    records = [
        serialised({"image": [image], "caption": [caption.encode()]})
        for image, caption in zip(images, captions, strict=True)
    ]
    write_array_record(tmp_path / "a.array_record", records)
    labels = {"info": {"features": {"label": {"names": ["tabby_cat", "dog"]}}}}
    table = pa.table({"image": images, "label": [0, 0, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(labels)})
    write_arrow(tmp_path / "a.parquet", "parquet", table)
    fill(tmp_path / "folder" / "tabby_cat", {"0.png": png(0), "1.png": png(1)})
    fill(tmp_path / "folder" / "zebra", {"2.png": png(2)})
    rows = [f"folder/tabby_cat/{n}.png,caption {n}" for n in range(2)]
    rows.append("folder/zebra/2.png,caption 2")
    (tmp_path / "a.csv").write_text("\n".join(["filepath,title", *rows]))
    features = {"image": F.Image(), "label": F.ClassLabel(names=["tabby_cat", "dog"])}
    examples = [{"image": image, "label": n // 2} for n, image in enumerate(images)]
    prepare(tmp_path, "animals", features, {"dev": examples})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return {
        "webdataset": SourceConfig(path=str(tmp_path / "a.tar")),
        "tfds": SourceConfig(kind="tfds", path="animals", split="dev"),
        "parquet": SourceConfig(kind="parquet", path=str(tmp_path / "a.parquet")),
        "table": SourceConfig(kind="table", path=str(tmp_path / "a.csv")),
        "folder": SourceConfig(kind="folder", path=str(tmp_path / "folder")),
        "array_record": SourceConfig(
            kind="array_record", path=str(tmp_path / "*.array_record"), image_key="image"
        ),
    }


def test_every_kind(configs, tmp_path):
    for kind, config in configs.items():
        config = dataclasses.replace(config, templates=("a photo of a {}", "one {}"))
        source = open_source(config, tmp_path / "cache", retries=0, on_bad_sample="fail")
        assert [source[index].image for index in range(3)] == [png(n) for n in range(3)], kind
        captions = [source.captions(index) for index in range(3)]
        if kind in LABELLED:
            assert captions[0] == ("a photo of a tabby cat", "one tabby cat")
        else:
            assert captions == [(f"caption {n}",) for n in range(3)]
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"index"}


def test_evaluation_sets_have_bare_class_names(configs, tmp_path):
    for kind in LABELLED:
        source = configs[kind]
        config = EvalSetConfig(
            kind=kind, path=source.path, split=source.split, templates=("a photo of a {}",)
        )
        assert open_source(config, tmp_path / "cache").captions(0) == ("tabby cat",)


def test_weights_reach_the_records(tmp_path):
    row = {"path": str(tmp_path / "x.png"), "a": "one", "b": "two"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (tmp_path / "x.png").write_bytes(png(0))
    config = SourceConfig(
        kind="table",
        path=str(tmp_path / "a.jsonl"),
        caption_keys=("a", "b"),
        caption_weights=(3, 1),
    )
    np.testing.assert_allclose(open_source(config, tmp_path)[0].weights, (0.75, 0.25))


def test_missing(configs, tmp_path):
    for kind, config in configs.items():
        config = dataclasses.replace(config, path=str(tmp_path / "none"), split="train")
        with pytest.raises(UserError) as caught:
            open_source(config, tmp_path / "cache")
        assert "\n" not in str(caught.value), kind


def test_quickstart(quickstart_cache):
    config = EvalSetConfig(kind="quickstart", path="unseen_concept")
    assert len(open_source(config, quickstart_cache)) > 100


def test_cache_dir(monkeypatch):
    monkeypatch.delenv("CLIP_JAX_CACHE", raising=False)
    assert cache_dir(DataConfig()) == Path.home() / ".cache" / "clip_jax"
    monkeypatch.setenv("CLIP_JAX_CACHE", "/scratch/cache")
    assert cache_dir(DataConfig()) == Path("/scratch/cache")
    assert cache_dir(DataConfig(cache_dir="~/mine")) == Path.home() / "mine"
