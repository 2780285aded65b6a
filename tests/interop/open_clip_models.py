"""Randomly initialised models of open_clip, and what they give, for tests beside ours."""

import contextlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

NO_TOKENIZER = "not-here"  # a name of Hugging Face's whose files are not in the directory
SMALL_VOCAB = {"vocab_size": 1000, "hf_tokenizer_name": NO_TOKENIZER}
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"width": 64, "heads": 1, "layers": 1, "context_length": 16, **SMALL_VOCAB},
}


def build(open_clip, cfg: dict, *, seed: int = 0):
    """An open_clip model of a `model_cfg`, all norms, biases and statistics off their start."""
    cfg = dict(cfg)
    custom = cfg.pop("custom_text", False) or "hf_model_name" in cfg["text_cfg"]
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(torch.exp(0.2 * torch.randn_like(buffer)))
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(7)
    return model


def save(model, cfg: dict, directory: Path, *, preprocess: dict | None = None, dtype=None) -> Path:
    """`local-dir:` as open_clip reads it."""
    from safetensors.torch import save_file

    tensors = {
        name: tensor.contiguous().to(dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "open_clip_model.safetensors")
    content = {"model_cfg": cfg, "preprocess_cfg": preprocess or {}}
    (directory / "open_clip_config.json").write_text(json.dumps(content))
    return directory


def load(open_clip, directory: Path):
    """The model of a directory by open_clip's own door, which is strict about names."""
    with warnings.catch_warnings(), contextlib.chdir(directory):
        warnings.simplefilter("ignore")
        return open_clip.create_model_and_transforms(f"local-dir:{directory}")[0].eval()


def random_inputs(cfg: dict, *, num: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Normalised float images [B, S, S, 3], and tokens: words, the end of text, padding."""
    rng = np.random.default_rng(seed)
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    size = vision["image_size"]
    image = rng.standard_normal((num, size, size, 3)).astype(np.float32)
    length, vocab = text.get("context_length", 77), text.get("vocab_size", 49408)
    tokens = np.zeros((num, length), np.int32)
    for row in tokens:
        end = rng.integers(3, length)
        row[:end] = rng.integers(3, vocab - 1, end)
        row[end] = text.get("eos_id", vocab - 1)
    return {"image": image, "tokens": tokens}


def forward(model, inputs: dict[str, np.ndarray]):
    """Normalised image and text features, logit scale and, where there is one, bias."""
    pixels = torch.from_numpy(inputs["image"].transpose(0, 3, 1, 2).copy())
    return model(pixels, torch.from_numpy(inputs["tokens"]).long())


def embeddings(model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        image, text, *_ = forward(model, inputs)
    return {"image": image.numpy(), "text": text.numpy()}


@contextlib.contextmanager
def shallow_trunks(monkeypatch, depth: int):
    """timm's SigLIP ViTs with fewer layers, in timm and in our table of its names."""
    import open_clip.timm_model as theirs

    from clip_jax.interop import open_clip_trunks as ours

    create = theirs.timm.create_model
    with monkeypatch.context() as patch:
        patch.setattr(
            theirs.timm, "create_model", lambda name, **kwargs: create(name, depth=depth, **kwargs)
        )
        trunks = {name: trunk._replace(depth=depth) for name, trunk in ours.TRUNKS.items()}
        patch.setattr(ours, "TRUNKS", trunks)
        yield
