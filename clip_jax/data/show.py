"""A contact sheet of what the model sees: images after augmentation, captions as they are fed."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from clip_jax.config.errors import UserError
from clip_jax.config.schema import ExperimentConfig, ImageTowerConfig
from clip_jax.data.host_batches import Batch, TrainingBatches
from clip_jax.data.page import escape, pixels_url, render_page, write_page
from clip_jax.data.record import Source
from clip_jax.data.text_inputs import PackedText, PaddedText
from clip_jax.data.tokenizers import Tokenizer

_SMALLEST_SIDE = 128  # pixels: smaller images are drawn with pixels of 2 x 2, 3 x 3...
_MARGIN, _FONT_SIZE, _LINE, _MOST_LINES = 10, 12, 15, 4  # pixels, and lines of a caption
_CHARACTER = 6.2  # pixels of a character, on average
_SUFFIXES = (".png", ".html")


class Shown(NamedTuple):
    """A sample as the model gets it."""

    image: NDArray[np.uint8]  # [height, width, 3]
    caption: str  # out of its tokens


def check_output(path: Path) -> None:
    """Raises UserError where `write_sheet` does not know the format."""
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{path.name} is neither .png nor .html; name one of them")


def shown_samples(
    config: ExperimentConfig,
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    text: PaddedText | PackedText,
    *,
    start_sample: int,
    count: int,
) -> list[Shown]:
    """Samples from a position of a run on, out of the arrays that a training step would get.

    Raises UserError as `TrainingBatches` and `stream_batches` do.
    """
    if config.data.streams:
        return _streamed(config, tokenizer, text, start_sample, count)
    # Groups that are packed together begin where they do in the run.
    group = config.data.packing.group_size or 1
    before = start_sample % group
    batches = TrainingBatches(
        config.data,
        sources,
        text,
        image=config.model.image,
        seed=config.seed,
        global_batch_size=-(-(before + count) // group) * group,
        process_index=0,
        process_count=1,
        start_sample=start_sample - before,
    )
    batch, _ = batches[0]
    return shown_batch(batch, config.model.image, tokenizer)[before : before + count]


def _streamed(
    config: ExperimentConfig,
    tokenizer: Tokenizer,
    text: PaddedText | PackedText,
    start_sample: int,
    count: int,
) -> list[Shown]:
    """Streams have to be read from their beginning, in the batches of the run."""
    from clip_jax.data.stream_batches import stream_batches  # late: Grain imports JAX

    size = config.global_batch_size
    samples: list[Shown] = []
    with stream_batches(
        config.data,
        text,
        image=config.model.image,
        seed=config.seed,
        global_batch_size=size,
        process_index=0,
        process_count=1,
        states=None,
        start_sample=0,
    ) as batches:
        for _ in range(start_sample // size):
            next(batches)
        while len(samples) < start_sample % size + count:
            samples += shown_batch(next(batches), config.model.image, tokenizer)
    return samples[start_sample % size :][:count]


def shown_batch(batch: Batch, image: ImageTowerConfig, tokenizer: Tokenizer) -> list[Shown]:
    """The samples of a batch, in order."""
    captions = [tokenizer.decode(ids) for ids in _token_ids(batch)]
    return [Shown(*both) for both in zip(_images(batch, image), captions, strict=True)]


def write_sheet(path: Path, samples: Sequence[Shown], *, title: str) -> None:
    """Write samples as a PNG, or as an HTML page, by the suffix.

    Raises UserError for another suffix, OSError where the folder cannot be written.
    """
    check_output(path)
    if path.suffix.lower() == ".png":
        contact_sheet(samples).save(path)
        return
    cards = "".join(
        f'<li style="width:{image.shape[1] * scale + 18}px">'
        f'<img src="{pixels_url(Image.fromarray(image))}" alt="" '
        f'width="{image.shape[1] * scale}" height="{image.shape[0] * scale}">'
        f"<p>{escape(caption)}</p></li>"
        for image, caption in samples
        for scale in [_scale(image)]
    )
    page = render_page(
        title=title,
        summary=f"{len(samples)} samples, after augmentation, with the captions in their tokens.",
        body=f'<section><ul class="seen">{cards}</ul></section>',
        footer="clip-jax data show. Images are those of the batch, pixel by pixel.",
    )
    write_page(path, page)


def contact_sheet(samples: Sequence[Shown]) -> Image.Image:
    """The samples row by row on a nearly square sheet, each over its caption.

    Small images are enlarged by a whole number, so every pixel of a batch is on the sheet.
    """
    drawn = [np.kron(s.image, np.ones((_scale(s.image),) * 2 + (1,), np.uint8)) for s in samples]
    width = max(image.shape[1] for image in drawn) + _MARGIN
    height = max(image.shape[0] for image in drawn) + _MOST_LINES * _LINE + _MARGIN
    columns = min(len(samples), max(1, round(math.sqrt(len(samples) * height / width))))
    rows = math.ceil(len(samples) / columns)
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for number, (image, sample) in enumerate(zip(drawn, samples, strict=True)):
        left = _MARGIN + number % columns * width
        top = _MARGIN + number // columns * height
        sheet.paste(Image.fromarray(image), (left, top))
        lines = textwrap.wrap(
            sample.caption,
            max(1, int((width - _MARGIN) / _CHARACTER)),
            max_lines=_MOST_LINES,
            placeholder="...",
        )
        for line, words in enumerate(lines):
            place = (left, top + image.shape[0] + line * _LINE)
            draw.text(place, words, fill="black", font=font)
    return sheet


def _scale(image: NDArray[np.uint8]) -> int:
    return max(1, math.ceil(_SMALLEST_SIDE / max(image.shape[:2])))


def _images(batch: Batch, image: ImageTowerConfig) -> list[NDArray[np.uint8]]:
    if "image" in batch:
        return list(batch["image"])
    side = image.patch_size
    pictures = []
    for patches_ND, (rows, columns) in zip(
        batch["patches"], batch["spatial_shapes"].tolist(), strict=True
    ):
        grid = patches_ND[: rows * columns].reshape(rows, columns, side, side, 3)
        pictures.append(grid.swapaxes(1, 2).reshape(rows * side, columns * side, 3))
    return pictures


def _token_ids(batch: Batch) -> list[list[int]]:
    """The tokens of each sample: a row, or its segment of a packed group."""
    if "segments" not in batch:
        return [row.tolist() for row in batch["tokens"]]
    ids = []
    for tokens_RL, segments_RL, eot_G in zip(
        batch["tokens"], batch["segments"], batch["eot"], strict=True
    ):
        for end in eot_G.tolist():
            row, place = divmod(end, tokens_RL.shape[1])
            own = segments_RL[row] == segments_RL[row, place]
            ids.append(tokens_RL[row, own].tolist())
    return ids
