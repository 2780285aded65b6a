import base64
import dataclasses
import io
import re

import numpy as np
import pytest
from data.tars import pairs, png, write_tar
from PIL import Image

from clip_jax.config import (
    AugmentConfig,
    DataConfig,
    ExperimentConfig,
    ImageTowerConfig,
    ModelConfig,
    SourceConfig,
    TextTowerConfig,
    UserError,
)
from clip_jax.config.schema import PackingConfig, StreamConfig
from clip_jax.data.configured_text import configured_text
from clip_jax.data.host_batches import TrainingBatches
from clip_jax.data.naflex import naflex_size
from clip_jax.data.show import Shown, contact_sheet, shown_samples, write_sheet
from clip_jax.data.sources.webdataset import WebdatasetSource
from clip_jax.data.stream_batches import stream_batches
from clip_jax.data.tokenizers import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"caption {n} a cat" for n in range(30)], 300, lowercase=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> WebdatasetSource:
    folder = tmp_path_factory.mktemp("show")
    return WebdatasetSource(str(write_tar(folder / "a.tar", pairs(0, 30))), folder / "index")


def config(image=None, **data) -> ExperimentConfig:
    return ExperimentConfig(
        seed=5,
        global_batch_size=8,
        model=ModelConfig(
            image=image or ImageTowerConfig(image_size=12, patch_size=4),
            text=TextTowerConfig(vocab_size=300, eot_id=2, context_length=9),
        ),
        data=DataConfig(
            sources={"a": SourceConfig(path="a.tar")},
            augment=AugmentConfig(crop_scale=(0.3, 1.0), horizontal_flip=0.5),
            **data,
        ),
    )


def shown(config, source, tokenizer, start_sample, count) -> list[Shown]:
    sources = {"a": source}
    text = configured_text(config, sources, tokenizer)
    return shown_samples(config, sources, tokenizer, text, start_sample=start_sample, count=count)


def run_of(config, source, tokenizer, num_batches):
    """The batches of a run of this config, one after another."""
    sources = {"a": source}
    batches = TrainingBatches(
        config.data,
        sources,
        configured_text(config, sources, tokenizer),
        image=config.model.image,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        process_index=0,
        process_count=1,
        start_sample=0,
    )
    return [batches[number][0] for number in range(num_batches)]


def test_samples_are_those_of_the_run(source, tokenizer):
    batches = run_of(config(), source, tokenizer, 5)
    images = np.concatenate([batch["image"] for batch in batches])
    rows = np.concatenate([batch["tokens"] for batch in batches])
    samples = shown(config(), source, tokenizer, 3, 35)  # into the second epoch
    assert len(samples) == 35
    assert (np.stack([sample.image for sample in samples]) == images[3:38]).all()
    assert [sample.caption for sample in samples] == [tokenizer.decode(row) for row in rows[3:38]]
    assert len({sample.caption for sample in samples}) >= 27
    assert re.fullmatch(r"caption \d+( \d)*", samples[0].caption)


def test_packed_captions_come_apart(source, tokenizer):
    packed = config(packing=PackingConfig(group_size=4, rows=3))
    samples, padded = (shown(c, source, tokenizer, 3, 11) for c in (packed, config()))
    assert [s.caption for s in samples] == [s.caption for s in padded]
    assert all((a.image == b.image).all() for a, b in zip(samples, padded, strict=True))
    # What is shown is what is left in the rows: here there is room for some captions' starts only.
    tight = shown(config(packing=PackingConfig(group_size=4, rows=2)), source, tokenizer, 0, 4)
    whole = shown(config(), source, tokenizer, 0, 4)
    for cut, caption in zip(tight, whole, strict=True):
        assert caption.caption.startswith(cut.caption)
    assert any(cut.caption != caption.caption for cut, caption in zip(tight, whole, strict=True))


def test_patches_are_put_together(tmp_path, tokenizer):
    """A picture of 48 x 24 that needs no resizing comes out of its 18 patches as it went in."""
    assert naflex_size(48, 24, patch_size=8, max_num_patches=18) == (48, 24)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 48, 3), np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "png")
    members = [(f"{n}.png", buffer.getvalue()) for n in range(2)]
    members += [(f"{n}.txt", b"a cat") for n in range(2)]
    tar = write_tar(tmp_path / "n.tar", sorted(members))
    source = WebdatasetSource(str(tar), tmp_path / "index")
    tower = ImageTowerConfig(kind="naflex", patch_size=8, max_num_patches=18)
    plain = config(tower)
    plain = ExperimentConfig(
        global_batch_size=2,
        model=plain.model,
        data=DataConfig(sources=plain.data.sources, decode="exact"),
    )
    [first, _] = shown(plain, source, tokenizer, 0, 2)
    assert (first.image == pixels).all()
    assert first.caption == "a cat"


def test_the_sheet_has_every_pixel(source, tokenizer, tmp_path):
    samples = shown(config(), source, tokenizer, 0, 7)
    path = tmp_path / "sheet.png"
    write_sheet(path, samples, title="t")
    sheet = np.asarray(Image.open(path))
    scale, margin = 11, 10  # 12 pixels are drawn at 132
    found = 0
    for top in range(margin, sheet.shape[0] - 132, 132 + margin + 60):
        for left in range(margin, sheet.shape[1] - 131, 132 + margin):
            cell = sheet[top : top + 132 : scale, left : left + 132 : scale]
            if found < len(samples):
                assert (cell == samples[found].image).all(), found
                caption = sheet[top + 132 : top + 132 + 15, left : left + 132]
                assert caption.min() < 100  # something is written there
                found += 1
    assert found == len(samples)
    again = tmp_path / "again.png"
    write_sheet(again, shown(config(), source, tokenizer, 0, 7), title="t")
    assert again.read_bytes() == path.read_bytes()


def test_large_images_are_not_enlarged():
    image = np.random.default_rng(0).integers(0, 256, (224, 200, 3), np.uint8)
    sheet = np.asarray(contact_sheet([Shown(image, "x" * 500)] * 3))
    assert (sheet[10:234, 10:210] == image).all()
    assert sheet.shape[1] == 10 + 3 * 210 or sheet.shape[0] > 300


def test_the_page_has_every_pixel_and_no_tags_of_captions(tmp_path):
    images = [np.asarray(Image.open(io.BytesIO(png(seed)))) for seed in range(3)]
    samples = [Shown(image, "<script>alert(1)</script> & {{title}}") for image in images]
    path = tmp_path / "sheet.HTML"
    write_sheet(path, samples, title="<b>")
    content = path.read_text()
    assert "<script" not in content
    assert content.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; {{title}}") == 3
    assert "&lt;b&gt;" in content
    urls = re.findall(r'src="data:image/png;base64,([^"]*)"', content)
    for url, image in zip(urls, images, strict=True):
        assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(url)))) == image).all()


def test_other_suffixes(tmp_path):
    with pytest.raises(UserError, match=r"sheet\.gif is neither \.png nor \.html"):
        write_sheet(tmp_path / "sheet.gif", [], title="t")


def test_streams_are_read_from_their_beginning(tmp_path, tokenizer):
    for number in range(2):
        write_tar(tmp_path / f"s-{number}.tar", pairs(20 * number, 20))
    plain = config(stream=StreamConfig(num_streams=2, interleave=1, window=4))
    sources = {"a": SourceConfig(path=str(tmp_path / "s-{0..1}.tar"), access="stream")}
    streamed = dataclasses.replace(plain, data=dataclasses.replace(plain.data, sources=sources))
    text = configured_text(streamed, {}, tokenizer)
    samples = shown_samples(streamed, {}, tokenizer, text, start_sample=11, count=10)
    run = {"image": plain.model.image, "seed": plain.seed, "global_batch_size": 8}
    one = {"process_index": 0, "process_count": 1, "states": None, "start_sample": 0}
    with stream_batches(streamed.data, text, **run, **one) as batches:
        images = np.concatenate([next(batches)["image"] for _ in range(3)])
    assert (np.stack([sample.image for sample in samples]) == images[11:21]).all()
    assert all(sample.caption.startswith("caption ") for sample in samples)
