"""Tars of which everything is known, and what the check says about them."""

import io
import json

import numpy as np
import pytest
from data.tars import pairs, png, write_tar
from PIL import Image

from clip_jax.data.check import check_source
from clip_jax.data.check_summary import findings, summary, table, to_json
from clip_jax.data.sources.webdataset import WebdatasetSource
from clip_jax.data.tokenizers import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a cat", "stock photo", "the same picture"], 300, lowercase=True)


def jpeg(seed: int, width: int, height: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "jpeg", quality=90)
    return buffer.getvalue()


def sample(key: str, image: bytes, caption: str | bytes, extension: str = "png"):
    text = caption if isinstance(caption, bytes) else caption.encode()
    return [(f"{key}.{extension}", image), (f"{key}.txt", text)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> WebdatasetSource:
    """Three tars with 9 usable samples, 1 without caption member and 4 bad ones."""
    folder = tmp_path_factory.mktemp("check")
    same = png(7)
    write_tar(
        folder / "a-0.tar",
        [
            *sample("a0", png(0, 16), "a cat"),
            *sample("a1", png(1, 20), "cat"),
            *sample("a2", same, "the same picture"),
            *sample("a3", same, "again the same one"),
            ("a4.png", png(9)),
        ],
    )
    write_tar(
        folder / "a-1.tar",
        [
            *sample("b0", jpeg(3, 60, 15), "stock photo", "jpg"),
            *sample("b1", jpeg(4, 30, 40), "stock photo", "jpg"),
            *sample("b2", png(5), "stock photo"),
            *sample("b3", png(6), "IMG_1234.jpg"),
            *sample("b4", b"not a picture", "a dog"),
            *sample("b5", jpeg(8, 64, 64)[:-600], "cut short", "jpg"),
        ],
    )
    long = " ".join(["word"] * 100)
    document = json.dumps({"caption": long, "url": "x", "width": 16}).encode()
    write_tar(
        folder / "a-2.tar",
        [
            ("c0.png", png(10)),
            ("c0.json", document),
            *sample("c1", png(11), b"  \n"),
            *sample("c2", png(12), b"\xff\xfe broken"),
        ],
    )
    return WebdatasetSource(str(folder / "a-{0..2}.tar"), folder / "index")


@pytest.fixture(scope="module")
def checked(mixed, tokenizer):
    return check_source(
        "mixed", mixed, tokenizer, context_length=77, image_size=20, group_size=32, num_threads=2
    )


def test_counts(checked, mixed):
    assert len(mixed) == checked.num_samples == checked.num_checked == 13
    assert checked.num_skipped == 1
    assert checked.num_usable == 9
    assert checked.num_bad == {"image": 2, "caption": 2}
    assert sorted(checked.shard_sizes) == [3, 4, 6]
    assert {shard[-7:]: n for shard, n in checked.bad_by_shard.items()} == {
        "a-1.tar": 2,
        "a-2.tar": 2,
    }
    assert [(bad.row, bad.reason) for bad in checked.bad_samples] == [
        (8, "image"),
        (9, "image"),
        (11, "caption"),
        (12, "caption"),
    ]


def test_images(checked):
    assert list(checked.widths) == [16, 16, 16, 16, 16, 16, 20, 30, 60]
    assert list(checked.heights) == [15, 16, 16, 16, 16, 16, 16, 20, 40]
    assert list(checked.shorter_sides) == [15, 16, 16, 16, 16, 16, 16, 20, 30]
    assert next(iter(checked.aspects)) == 0.75
    assert checked.aspects.largest == 4.0
    assert checked.formats == {"PNG": 7, "JPEG": 2}
    assert checked.modes == {"RGB": 9}


def test_captions_and_tokens(checked, tokenizer):
    texts = ["a cat", "cat", "the same picture", "again the same one"]
    texts += ["stock photo"] * 3 + ["IMG_1234.jpg", " ".join(["word"] * 100)]
    assert list(checked.words) == sorted(len(text.split()) for text in texts)
    assert list(checked.characters) == sorted(map(len, texts))
    lengths = (tokenizer(texts, 1024) != tokenizer.pad_id).sum(axis=1)
    assert list(checked.tokens) == sorted(lengths.tolist())
    assert checked.share_cut == 1 / 9
    rows = tokenizer(texts, 77)
    assert checked.share_padding == pytest.approx((rows == tokenizer.pad_id).mean())
    assert checked.suspicious == {"one word": 2, "a file name or a URL": 1}
    assert checked.packing.group_size == 32
    assert 9 <= checked.packing.rows <= 32


def test_copies(checked, mixed):
    assert (checked.equal_images.num_groups, checked.equal_images.num_extra) == (1, 1)
    assert checked.equal_images.largest[0].members == [2, 3]
    assert (checked.equal_captions.num_groups, checked.equal_captions.num_extra) == (1, 2)
    [common] = checked.common_captions
    assert common == ("stock photo", 3, 4)
    assert mixed[common.row].captions[0] == common.text
    assert checked.look_alikes.num_groups == 0  # the equal ones are not told twice


def test_examples_are_what_stands_out(checked):
    rows = {examples.title: examples.rows for examples in checked.examples}
    assert rows["Most tokens"][0] == 10
    assert rows["Fewest words"] == [1, 7, 0, 4, 5, 6, 2, 3]
    assert rows["Smallest pictures"][0] == 4
    assert rows["Most elongated pictures"] == [4, 5]
    assert rows["Captions: one word"] == [1, 7]
    assert set(rows["Evenly spread"]) <= set(range(13)) - {8, 9, 11, 12}


def test_findings_and_figures_in_words(checked):
    found = "\n".join(findings(checked))
    assert "Left out: 1 sample without image or caption, beside the 13" in found
    assert "4 (30.8%) of the samples are bad (image 2, caption 2), in 2 shards" in found
    assert "1 (11.1%) of the images are byte by byte copies" in found
    assert "3 (33.3%) of the samples have the caption “stock photo”" in found
    assert "11.1% of the captions have more than 77 tokens" in found
    assert "7 (77.8%) of the images have a side below 20 pixels" in found
    rows = summary(checked)
    assert ("formats", "PNG 7, JPEG 2") in rows["Images"]
    assert ("shards", "3 of 3 to 6 samples") in rows["Samples"]
    text = table(checked)
    assert all(finding in text for finding in findings(checked))
    figures = json.loads(json.dumps(to_json(checked)))
    assert figures["num_bad"] == {"image": 2, "caption": 2}
    assert figures["equal_images"]["largest"] == [{"size": 2, "members": [2, 3]}]
    assert figures["tokens"]["largest"] == 502


def test_threads_do_not_matter(mixed, checked, tokenizer):
    again = check_source("mixed", mixed, tokenizer, context_length=77, image_size=20, num_threads=1)
    figures, expected = to_json(again), to_json(checked)
    for one in (figures, expected):
        del one["seconds"], one["packing"]
        for bad in one["bad_samples"]:
            del bad["message"]  # Pillow's have addresses in them
    assert figures == expected


def test_a_part_is_evenly_spread(tmp_path, tokenizer):
    source = WebdatasetSource(str(write_tar(tmp_path / "p.tar", pairs(0, 100))), tmp_path / "index")
    seen = []
    check = check_source(
        "p",
        source,
        tokenizer,
        context_length=8,
        image_size=16,
        num_samples=40,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (check.num_samples, check.num_checked, check.num_usable) == (100, 40, 40)
    assert seen == [(32, 40), (40, 40)]
    [typical] = [e.rows for e in check.examples if e.title == "Evenly spread"]
    assert typical == [0, 12, 25, 37, 50, 62, 75, 87]


def test_nothing_usable(tmp_path, tokenizer):
    members = [member for number in range(5) for member in sample(f"s{number}", b"x", "t")]
    tar = write_tar(tmp_path / "bad.tar", members)
    source = WebdatasetSource(str(tar), tmp_path / "index")
    check = check_source("bad", source, tokenizer, context_length=8, image_size=16)
    assert check.num_usable == 0
    assert findings(check) == ["None of the 5 samples that were checked can be used."]
    assert "bad (image)" in table(check)
    json.dumps(to_json(check))


def test_files_that_vanish_or_end_early(tmp_path, tokenizer):
    write_tar(tmp_path / "v-0.tar", pairs(0, 3))
    gone = write_tar(tmp_path / "v-1.tar", pairs(3, 3))
    cut = write_tar(tmp_path / "v-2.tar", pairs(6, 3))
    cut.write_bytes(cut.read_bytes()[: 4 * 512 + 5 * 512])
    source = WebdatasetSource(str(tmp_path / "v-{0..2}.tar"), tmp_path / "index", retries=0)
    kept = len(source)
    gone.unlink()
    check = check_source("v", source, tokenizer, context_length=8, image_size=16)
    assert check.num_checked == kept < 9
    assert check.num_bad == {"read": 3}
    assert list(check.bad_by_shard) == [str(gone)]
    assert [line.split(":")[0] for line in check.damaged] == [str(cut)]
    assert "is damaged or cut short" in findings(check)[0]
