"""From library to library and back: the same bytes per tensor."""

import json

import numpy as np
import pytest
from interop import open_clip_models as peer
from peers import open_clip_or_skip

from clip_jax.checkpoint import Workdir
from clip_jax.interop.tensors import read_tensors
from clip_jax.interop.transfer import export_weights, import_weights, weights_of_workdir

# ViT-B-32, narrow and shallow, with CLIP's vocabulary and so its tokenizer.
MODEL_CFG = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16},
    "text_cfg": {"width": 64, "heads": 1, "layers": 2},
}


@pytest.mark.parametrize(("dtype", "use_peer"), [("float32", True), ("float16", False)])
def test_open_clip_and_hugging_face(tmp_path, dtype, use_peer):
    open_clip = open_clip_or_skip()
    model = peer.build(open_clip, MODEL_CFG)
    first = peer.save(model, MODEL_CFG, tmp_path / "first", dtype=getattr(peer.torch, dtype))
    place = first
    for i, (source, target) in enumerate(
        [("open_clip", "huggingface"), ("huggingface", "open_clip")]
    ):
        workdir = Workdir(tmp_path / f"workdir_{i}")
        imported = import_weights(place, source, workdir, use_peer=use_peer)
        place = tmp_path / target
        exported = export_weights(weights_of_workdir(workdir), target, place, use_peer=use_peer)
        assert (
            all(report.differences.keys() == {"image", "text"} for report in (imported, exported))
            is use_peer
        )
    before, after = (
        read_tensors(directory / "open_clip_model.safetensors") for directory in (first, place)
    )
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == np.dtype(dtype)
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
        assert tensor.tobytes() == after[name].tobytes(), name
    # CLIP's tokenizer is known again, so open_clip runs its own.
    assert not (place / "tokenizer.json").exists()
    config = json.loads((place / "open_clip_config.json").read_text())
    assert config["model_cfg"]["quick_gelu"] is True
