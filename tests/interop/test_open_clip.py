"""open_clip's format against open_clip itself, with random weights, both ways."""

import contextlib
import copy
import dataclasses
import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop import open_clip_models as peer
from peers import open_clip_or_skip
from small import mesh_of

from clip_jax import load
from clip_jax.checkpoint import Workdir, unflatten
from clip_jax.config import ExperimentConfig, LossConfig, UserError
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.interop import open_clip as ours
from clip_jax.interop.embeddings import embed
from clip_jax.interop.open_clip_tables import rows
from clip_jax.interop.table import read_table
from clip_jax.interop.tensors import read_tensors, write_safetensors
from clip_jax.interop.transfer import export_weights, import_weights, weights_of_workdir
from clip_jax.interop.weights import flatten, model_shapes
from clip_jax.tasks import ContrastiveTask

SLOW = pytest.mark.slow
SIGLIP = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}


@pytest.fixture(scope="module")
def open_clip():
    return open_clip_or_skip()


def model_cfg(open_clip, name: str, *, vision: dict | None = None, text: dict | None = None, **top):
    """open_clip's own config of a model, with changes."""
    cfg = copy.deepcopy(open_clip.get_model_config(name))
    cfg["vision_cfg"] |= vision or {}
    cfg["text_cfg"] |= text or {}
    return cfg | top


# Full width, and the depth that keeps a case at a few seconds and 2 GB.
SHALLOW = {"vision": {"layers": 2}, "text": {"layers": 2, **peer.SMALL_VOCAB}}
CASES = {
    "ViT-B-32": {"vision": {"layers": 2}, "text": {"layers": 2}},  # with CLIP's tokenizer
    "ViT-B-32-quickgelu": SHALLOW,
    "ViT-L-14-336": SHALLOW,
    "ViT-H-14": SHALLOW,
    "RN50": {"text": {"layers": 1, **peer.SMALL_VOCAB}},
    "RN50x4": {"vision": {"layers": [2, 2, 2, 2]}, "text": {"layers": 1, **peer.SMALL_VOCAB}},
    "ViT-B-16-SigLIP": {"text": {"layers": 2, **peer.SMALL_VOCAB}},
    "ViT-SO400M-14-SigLIP": {"text": {"layers": 2, **peer.SMALL_VOCAB}},
    "ViT-B-32-SigLIP2-256": {"text": {"layers": 2, **peer.SMALL_VOCAB}},
    "ViT-L-14-CLIPA": SHALLOW,
    "ViT-M-16-alt": SHALLOW,  # LayerScale
}


# Each case of these differs in kind from the others; the rest is sizes, for `make test-slow`.
DEFAULT = ("ViT-B-32", "RN50", "ViT-B-16-SigLIP", "ViT-L-14-CLIPA", "ViT-M-16-alt")


@pytest.mark.parametrize(
    "name", [name if name in DEFAULT else pytest.param(name, marks=SLOW) for name in CASES]
)
def test_embeddings_both_ways(open_clip, name, tmp_path, monkeypatch):
    cfg = model_cfg(open_clip, name, **CASES[name])
    shallow = contextlib.nullcontext()
    if "timm_model_name" in cfg["vision_cfg"]:
        shallow = peer.shallow_trunks(monkeypatch, 2)
    with shallow:
        check_both_ways(open_clip, cfg, tmp_path, preprocess=SIGLIP if "SigLIP" in name else None)


def check_both_ways(open_clip, cfg, tmp_path, *, preprocess=None):
    model = peer.build(open_clip, cfg)
    theirs = peer.save(model, cfg, tmp_path / "theirs", preprocess=preprocess)
    inputs = peer.random_inputs(cfg)
    expected = peer.embeddings(model, inputs)
    del model
    gc.collect()

    weights = ours.read(theirs)
    found = embed(weights, inputs)
    for part in ("image", "text"):
        np.testing.assert_allclose(found[part], expected[part], rtol=0, atol=1e-5)

    (tmp_path / "ours").mkdir()
    ours.write(weights, tmp_path / "ours")
    again = ours.read(tmp_path / "ours")
    assert again.model == weights.model
    extras = [side.extras["open_clip"] | {"hf_model_name": None} for side in (weights, again)]
    assert extras[0] == extras[1]  # a folder of another machine is no name of a model
    assert_same_bytes(theirs, tmp_path / "ours")
    del weights, again
    gc.collect()
    found = peer.embeddings(peer.load(open_clip, tmp_path / "ours"), inputs)
    for part in ("image", "text"):
        np.testing.assert_array_equal(found[part], expected[part])


def assert_same_bytes(theirs, ours):
    before, after = (
        read_tensors(directory / "open_clip_model.safetensors") for directory in (theirs, ours)
    )
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
        assert tensor.tobytes() == after[name].tobytes(), name


# ---- BERT ------------------------------------------------------------------------------------


@pytest.fixture
def bert_cfg(tmp_path):
    """ViT-B-32 with a BERT of two layers, whose config is in a folder of its own."""
    import transformers

    bert = transformers.BertConfig(
        vocab_size=1000, num_hidden_layers=2, max_position_embeddings=64, hidden_act="gelu"
    )
    bert.save_pretrained(tmp_path / "bert")
    return {
        "embed_dim": 512,
        "quick_gelu": True,  # of the image tower alone
        "vision_cfg": {"layers": 2, "width": 768, "patch_size": 32, "image_size": 224},
        "text_cfg": {
            "hf_model_name": str(tmp_path / "bert"),
            "hf_model_pretrained": False,
            "hf_tokenizer_name": peer.NO_TOKENIZER,
            "vocab_size": 1000,
            "context_length": 32,
            "eos_id": 102,
        },
    }


@pytest.mark.parametrize(
    ("pooler", "projection"),
    [
        ("mean_pooler", "mlp"),
        ("cls_pooler", "linear"),
        pytest.param("cls_last_hidden_state_pooler", "linear", marks=SLOW),
    ],
)
def test_bert_both_ways(open_clip, bert_cfg, pooler, projection, tmp_path):
    bert_cfg["text_cfg"] |= {"hf_pooler_type": pooler, "hf_proj_type": projection}
    check_both_ways(open_clip, bert_cfg, tmp_path)


# ---- Gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "kind"),
    [
        ("ViT-B-32", SHALLOW, "softmax"),
        ("ViT-B-16-SigLIP", {"text": {"layers": 2, **peer.SMALL_VOCAB}}, "sigmoid"),
    ],
)
def test_gradients_of_the_loss(open_clip, name, changes, kind, tmp_path, monkeypatch):
    """open_clip's gradients, carried over by the table as if they were weights."""
    cfg = model_cfg(open_clip, name, **changes)
    with peer.shallow_trunks(monkeypatch, 2):
        model = peer.build(open_clip, cfg)
        weights = ours.read(peer.save(model, cfg, tmp_path / "theirs"))
    inputs = peer.random_inputs(cfg, num=4)
    loss_of = open_clip.loss.ClipLoss if kind == "softmax" else open_clip.loss.SigLipLoss
    loss = loss_of()(*peer.forward(model, inputs))
    loss.backward()
    custom_text = kind == "sigmoid"
    table = rows(weights.model, custom_text=custom_text, vector_scalars=False)
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    expected = read_table(table, theirs, model_shapes(weights.model))

    found_loss, gradients = loss_and_gradients(weights, inputs, kind)
    assert found_loss == pytest.approx(loss.item(), rel=1e-6)
    found = flatten(gradients)
    whole = np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in expected.values()))
    errors = {path: np.linalg.norm(found[path] - expected[path]) / whole for path in expected}
    assert set(found) == set(expected)
    assert np.linalg.norm(list(errors.values())) < 1e-5
    # Array by array, but for those whose gradient is nothing but rounding, as of the keys' biases.
    for path, array in expected.items():
        if np.linalg.norm(array) > 1e-4 * whole:
            np.testing.assert_array_less(errors[path] * whole, 2e-5 * np.linalg.norm(array), path)


def loss_and_gradients(weights, inputs, kind):
    config = ExperimentConfig(
        model=weights.model,
        global_batch_size=len(inputs["image"]),
        precision="float32",
        loss=LossConfig(kind=kind),
    )
    task = ContrastiveTask(config, mesh_of())

    @jax.jit
    def run(params):
        with jax.default_matmul_precision("highest"):
            return jax.value_and_grad(
                lambda params: task.loss(params, {}, inputs, rng=jax.random.key(0), step=0)[0]
            )(params)

    params = jax.tree.map(jnp.asarray, unflatten(weights.arrays))
    loss, gradients = jax.device_get(run(params))
    return float(loss), gradients


# ---- Files -----------------------------------------------------------------------------------


@pytest.fixture
def tiny(open_clip, tmp_path):
    return peer.save(peer.build(open_clip, peer.TINY), peer.TINY, tmp_path / "tiny")


def test_torch_files_and_files_by_name(open_clip, tiny):
    expected = ours.read(tiny).arrays
    state = peer.build(open_clip, peer.TINY).state_dict()
    (tiny / "open_clip_model.safetensors").unlink()
    # A checkpoint of open_clip's training, on several GPUs.
    checkpoint = {"epoch": 3, "state_dict": {f"module.{name}": t for name, t in state.items()}}
    peer.torch.save(checkpoint, tiny / "epoch_3.pt")
    peer.torch.save(state, tiny / "other.bin")
    for path in (tiny / "epoch_3.pt", tiny / "other.bin"):
        found = ours.read(path).arrays
        assert all(np.array_equal(found[name], array) for name, array in expected.items())
    with pytest.raises(UserError, match=r"found epoch_3\.pt, other\.bin"):
        ours.read(tiny)
    (tiny / "other.bin").unlink()
    assert ours.read(tiny).model == ours.read(tiny / "epoch_3.pt").model


def test_odd_tensors_are_named(tiny):
    file = tiny / "open_clip_model.safetensors"
    tensors = read_tensors(file)
    extra = {"visual.bn1.num_batches_tracked": np.zeros((), np.int64)}
    nan = tensors["visual.proj"].copy()
    nan[0, 0] = np.nan
    for changed, named in (
        (tensors | {"visual.extra": np.zeros(3, np.float32)}, "visual.extra"),
        (tensors | extra, "visual.bn1.num_batches_tracked"),
        ({k: v for k, v in tensors.items() if k != "ln_final.bias"}, "ln_final.bias"),
        (tensors | {"visual.proj": tensors["visual.proj"][:, :-1]}, r"visual\.proj.*\(64, 31\)"),
        (tensors | {"visual.proj": nan}, "not finite"),
    ):
        write_safetensors(file, changed)
        with pytest.raises(UserError, match=named):
            ours.read(tiny)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        ours.read(tiny)
    (tiny / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match=r"no open_clip_config\.json"):
        ours.read(file)


def test_logit_scale_as_a_vector_and_other_training_settings(open_clip, tmp_path):
    cfg = peer.TINY | {"nonscalar_logit_scale": True, "init_logit_scale": 2.302585092994046}
    theirs = peer.save(peer.build(open_clip, cfg), cfg, tmp_path / "theirs")
    weights = ours.read(theirs)
    assert weights.arrays["log_logit_scale"].shape == ()
    assert weights.model.logit_scale_init == 10.0
    model = dataclasses.replace(weights.model, name="mine", logit_scale_max=1000.0)
    (tmp_path / "ours").mkdir()
    ours.write(dataclasses.replace(weights, model=model), tmp_path / "ours")
    assert ours.read(tmp_path / "ours").model == model
    assert_same_bytes(theirs, tmp_path / "ours")
    peer.load(open_clip, tmp_path / "ours")


# ---- The parity gate -------------------------------------------------------------------------


def test_a_resnet_through_a_workdir(open_clip, tmp_path):
    """Its statistics and their counts of batches are among the bytes that come back."""
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    cfg = peer.TINY | {"vision_cfg": vision}
    theirs = peer.save(peer.build(open_clip, cfg), cfg, tmp_path / "theirs")
    workdir = Workdir(tmp_path / "workdir")
    imported = import_weights(theirs, "open_clip", workdir)
    exported = export_weights(weights_of_workdir(workdir), "open_clip", tmp_path / "ours")
    for report in (imported, exported):  # texts cannot be: the directory has no tokenizer
        assert report.differences.keys() == {"image"}
    assert_same_bytes(theirs, tmp_path / "ours")


def test_a_bert_of_ones_own(open_clip, bert_cfg, tmp_path):
    """Of no published size, with its tokenizer: open_clip finds both in the directory."""
    bert_cfg["text_cfg"]["context_length"] = 64
    weights = ours.read(peer.save(peer.build(open_clip, bert_cfg), bert_cfg, tmp_path / "theirs"))
    captions = ["a photo of a cat", "two dogs run on a beach at sunset", "3 red apples"]
    tokenizer = Tokenizer.train(captions, vocab_size=200, lowercase=True, kind="wordpiece")
    text = dataclasses.replace(weights.model.text, eot_id=tokenizer.eot_id)
    weights = dataclasses.replace(
        weights,
        model=dataclasses.replace(weights.model, text=text),
        tokenizer=tokenizer,
        extras={},
    )
    report = export_weights(weights, "open_clip", tmp_path / "ours")
    assert report.differences.keys() == {"image", "text"}
    file = tmp_path / "ours" / "open_clip_config.json"
    config = json.loads(file.read_text())
    assert config["model_cfg"]["text_cfg"]["hf_model_name"] == "."
    config["model_cfg"]["text_cfg"]["context_length"] = 16  # fewer than its positions
    file.write_text(json.dumps(config))
    _, _, tokenizer = load(tmp_path / "ours")
    assert tokenizer(["a cat " * 40]).shape == (1, 16)
