"""Independent oracles: the published formulas in float64 torch, a row at a time, and open_clip.

open_clip's losses are read from its `loss.py` alone, so that they run where its other
dependencies are not installed.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch


def unit_rows(batch: int, embed_dim: int, *, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(batch, embed_dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def random_pairs(batch: int, embed_dim: int, *, aligned: bool = False) -> dict[str, np.ndarray]:
    """Embeddings, ids with duplicates on both sides, and weights with padding at the end.

    float64 arrays of float32 numbers: the oracle and the loss under test get the same ones.
    """
    generator = np.random.default_rng(7)
    image = unit_rows(batch, embed_dim, seed=0)
    text = unit_rows(batch, embed_dim, seed=1)
    if aligned:
        text = image + 0.1 * text
        text /= np.linalg.norm(text, axis=1, keepdims=True)
    weights = generator.uniform(0.5, 2, batch)
    weights[-batch // 8 :] = 0
    return {
        "image": image.astype(np.float32).astype(np.float64),
        "text": text.astype(np.float32).astype(np.float64),
        "weights": weights.astype(np.float32).astype(np.float64),
        "image_ids": generator.integers(0, batch // 2, batch).astype(np.int32),
        "text_ids": generator.integers(0, 2 * batch, batch).astype(np.int32),
    }


def textbook(
    pairs: dict[str, np.ndarray],
    scale: float,
    bias: float,
    *,
    kind: str,
    use: tuple[str, ...] = (),
    duplicates: str = "exclude",
    beta: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[float, list[np.ndarray]]:
    """Loss and gradients for image, text, scale and bias. `use`: which of ids and weights count."""
    inputs = [torch.tensor(pairs["image"]), torch.tensor(pairs["text"])]
    inputs += [torch.tensor(scale, dtype=torch.float64), torch.tensor(bias, dtype=torch.float64)]
    image, text, s, c = (x.requires_grad_() for x in inputs)
    logits = s * image @ text.T + (c if kind == "sigmoid" else 0 * c)
    batch = len(image)
    weights = pairs["weights"] if "weights" in use else np.ones(batch)

    def duplicate(i: int, j: int) -> bool:
        return any(pairs[n][i] == pairs[n][j] for n in ("image_ids", "text_ids") if n in use)

    total = torch.zeros((), dtype=torch.float64)
    for i in range(batch):
        if weights[i] == 0:
            continue
        others = [j for j in range(batch) if j != i and weights[j] > 0]
        negatives = [j for j in others if not duplicate(i, j)]
        positives = [i]
        if duplicates == "positive":
            positives += [j for j in others if duplicate(i, j)]
        for line in (logits[i], logits[:, i]):
            loss = _row(line[positives], line[negatives], kind, beta, label_smoothing)
            total = total + weights[i] * loss
    loss = total / (2 * weights.sum())
    loss.backward()
    return loss.item(), [x.grad.numpy() for x in (image, text, s, c)]


def _row(
    positives: torch.Tensor,
    negatives: torch.Tensor,
    kind: str,
    beta: float,
    label_smoothing: float,
) -> torch.Tensor:
    hardness = (beta * negatives).detach().exp()
    if len(negatives):
        hardness = hardness / hardness.mean()
    if kind == "sigmoid":
        yes, no = torch.sigmoid(positives).log(), torch.sigmoid(-negatives).log()
        return -yes.mean() - (hardness * no).sum()
    norm = (positives.exp().sum() + (hardness * negatives.exp()).sum()).log()
    smooth = torch.cat([positives, negatives]).mean()
    return norm - (1 - label_smoothing) * positives.mean() - label_smoothing * smooth


def open_clip_losses() -> Any:
    """The module `open_clip.loss`, or None where open_clip is not installed."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "loss.py"
    loss_spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert loss_spec is not None
    assert loss_spec.loader is not None
    module = importlib.util.module_from_spec(loss_spec)
    loss_spec.loader.exec_module(module)
    return module


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    difference = np.linalg.norm(np.asarray(got, np.float64) - np.asarray(expected))
    return float(difference / max(np.linalg.norm(expected), 1e-300))
