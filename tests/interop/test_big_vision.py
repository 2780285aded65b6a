"""big_vision's two-tower archives against transformers' SigLIP and against the formula.

The oracles take random archives: SiglipModel by a mapping of this file's own, and the arithmetic of
the papers, written out in NumPy.
"""

import dataclasses

import numpy as np
import pytest
from interop.big_vision_archives import (
    DEPTH,
    GRID,
    HEADS,
    LENGTH,
    MLP,
    PATCH,
    VOCAB,
    WIDTH,
    archive,
    expected_embeddings,
    sample_inputs,
    saved,
)
from PIL import Image

from clip_jax.config import UserError
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.interop import big_vision
from clip_jax.interop.embeddings import embed
from clip_jax.interop.table import write_table
from clip_jax.interop.transfer import detect_format, export_weights
from clip_jax.interop.verify import check_again, described
from clip_jax.interop.weights import Weights

LIMIT = 1e-5  # of normalised embeddings


@pytest.mark.parametrize(
    "options",
    [{}, {"image_head": True, "bias": False, "pooling": "tok"}, {"pooling": "gap"}],
    ids=["siglip", "lit", "gap"],
)
def test_equals_the_formula(options, tmp_path):
    tensors = archive(scanned=True, **options)
    weights = big_vision.read(saved(tensors, tmp_path))
    inputs = sample_inputs()
    ours, expected = embed(weights, inputs), expected_embeddings(tensors, inputs)
    for part in ("image", "text"):
        np.testing.assert_allclose(ours[part], expected[part], atol=LIMIT, rtol=0)
    assert weights.arrays["log_logit_scale"] == tensors["params/t"][0]
    assert (weights.model.logit_bias_init is None) == (options.get("bias") is False)


# ---- transformers ----------------------------------------------------------------------------


def siglip_model(tensors):
    """transformers' SiglipModel with the numbers of an archive whose layers are named."""
    from interop.hf_models import torch, transformers  # skips where there is none

    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
    }
    tokens = {"vocab_size": VOCAB, "max_position_embeddings": LENGTH}
    tokens |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.SiglipConfig(
        text_config=shared | tokens,
        vision_config=shared | {"image_size": GRID * PATCH, "patch_size": PATCH},
    )
    model = transformers.SiglipModel(config).eval()
    theirs = {name.removeprefix("params/"): value for name, value in tensors.items()}
    state = {"logit_scale": theirs["t"], "logit_bias": theirs["b"]}

    def dense(ours, name):
        kernel = theirs[f"{name}/kernel"]
        num_out = theirs[f"{name}/bias"].size
        state[f"{ours}.weight"] = kernel.reshape(-1, num_out).T
        state[f"{ours}.bias"] = theirs[f"{name}/bias"].reshape(-1)

    def norm(ours, name):
        state[f"{ours}.weight"] = theirs[f"{name}/scale"]
        state[f"{ours}.bias"] = theirs[f"{name}/bias"]

    towers = {"vision_model": ("img", "Transformer"), "text_model": ("txt", "Encoder_0")}
    for ours, (tower, encoder_name) in towers.items():
        for i in range(DEPTH):
            block, layer = f"{tower}/{encoder_name}/encoderblock_{i}", f"{ours}.encoder.layers.{i}"
            attention = f"{block}/MultiHeadDotProductAttention_0"
            for short, part in (("q", "query"), ("k", "key"), ("v", "value")):
                dense(f"{layer}.self_attn.{short}_proj", f"{attention}/{part}")
            dense(f"{layer}.self_attn.out_proj", f"{attention}/out")
            dense(f"{layer}.mlp.fc1", f"{block}/MlpBlock_0/Dense_0")
            dense(f"{layer}.mlp.fc2", f"{block}/MlpBlock_0/Dense_1")
            norm(f"{layer}.layer_norm1", f"{block}/LayerNorm_0")
            norm(f"{layer}.layer_norm2", f"{block}/LayerNorm_1")
    norm("vision_model.post_layernorm", "img/Transformer/encoder_norm")
    norm("text_model.final_layer_norm", "txt/Encoder_0/encoder_norm")
    dense("text_model.head", "txt/head")
    vision = "vision_model.embeddings"
    state[f"{vision}.patch_embedding.weight"] = theirs["img/embedding/kernel"].transpose(3, 2, 0, 1)
    state[f"{vision}.patch_embedding.bias"] = theirs["img/embedding/bias"]
    state[f"{vision}.position_embedding.weight"] = theirs["img/pos_embedding"][0]
    text = "text_model.embeddings"
    state[f"{text}.token_embedding.weight"] = theirs["txt/Embed_0/embedding"]
    state[f"{text}.position_embedding.weight"] = theirs["txt/pos_embedding"][0]
    head, ours = "img/MAPHead_0", "vision_model.head"
    attention = f"{head}/MultiHeadDotProductAttention_0"
    state[f"{ours}.probe"] = theirs[f"{head}/probe"]
    parts = ("query", "key", "value")
    kernels = [theirs[f"{attention}/{part}/kernel"].reshape(WIDTH, WIDTH).T for part in parts]
    state[f"{ours}.attention.in_proj_weight"] = np.concatenate(kernels)
    biases = [theirs[f"{attention}/{part}/bias"].reshape(-1) for part in parts]
    state[f"{ours}.attention.in_proj_bias"] = np.concatenate(biases)
    dense(f"{ours}.attention.out_proj", f"{attention}/out")
    norm(f"{ours}.layernorm", f"{head}/LayerNorm_0")
    dense(f"{ours}.mlp.fc1", f"{head}/MlpBlock_0/Dense_0")
    dense(f"{ours}.mlp.fc2", f"{head}/MlpBlock_0/Dense_1")
    content = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in state.items()}
    model.load_state_dict(content)  # strict: every one of theirs is set
    return torch, model


def test_equals_transformers_siglip(tmp_path):
    tensors = archive()
    torch, model = siglip_model(tensors)
    weights, inputs = big_vision.read(saved(tensors, tmp_path)), sample_inputs()
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(inputs["tokens"]),
            pixel_values=torch.tensor(inputs["image"].transpose(0, 3, 1, 2)),
        )
    ours = embed(weights, inputs)
    np.testing.assert_allclose(ours["image"], out.image_embeds.numpy(), atol=LIMIT, rtol=0)
    np.testing.assert_allclose(ours["text"], out.text_embeds.numpy(), atol=LIMIT, rtol=0)
    scale, bias = np.exp(weights.arrays["log_logit_scale"]), weights.arrays["logit_bias"]
    logits = scale * ours["text"] @ ours["image"].T + bias
    np.testing.assert_allclose(logits, out.logits_per_text.numpy(), atol=1e-3, rtol=0)


# ---- Files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scanned": True, "naflex": True},
        {"image_head": True, "bias": False, "pooling": "tok"},
        {"pooling": "gap"},
    ],
    ids=["siglip", "naflex", "lit", "gap"],
)
def test_round_trip_returns_every_byte(options, tmp_path):
    tensors = archive(**options)
    tensors["params/txt/Embed_0/embedding"] = tensors["params/txt/Embed_0/embedding"].astype("f2")
    weights = big_vision.read(saved(tensors, tmp_path))
    report = export_weights(weights, "big_vision", tmp_path / "out")
    assert detect_format(tmp_path / "out") == "big_vision"
    assert not report.differences  # nobody else ran it
    with np.load(tmp_path / "out" / "model.npz") as written:
        assert set(written.files) == set(tensors)
        for name, tensor in tensors.items():
            assert written[name].dtype == tensor.dtype
            np.testing.assert_array_equal(written[name], tensor)


def test_names_may_lack_params_and_have_optimizer_state(tmp_path):
    tensors = archive()
    plain = {name.removeprefix("params/"): tensor for name, tensor in tensors.items()}
    plain["opt/0/count"] = np.zeros((), np.int32)
    more = tensors | {"opt/0/mu/t": np.ones(1, np.float32), "extra/step": np.ones((), np.int32)}
    expected = big_vision.read(saved(tensors, tmp_path))
    for name, content in {"plain.npz": plain, "more.npz": more}.items():
        check_again(expected, big_vision.read(saved(content, tmp_path, name)))


def test_old_layouts_of_positions(tmp_path):
    tensors = archive(pooling="tok")
    first = np.full((1, 1, WIDTH), 0.25, np.float32)
    old = dict(tensors)
    old["params/img/pos_embedding"] = np.concatenate([first, old["params/img/pos_embedding"]], 1)
    old["params/img/Transformer/posembed_input/pos_embedding"] = old.pop("params/img/pos_embedding")
    old["params/txt/Encoder_0/pos_embedding"] = np.ones((1, LENGTH, WIDTH), np.float32)
    weights = big_vision.read(saved(old, tmp_path))
    inputs = sample_inputs()
    # What they mean now: the class token has its position in it, and text positions are summed.
    tensors["params/img/cls"] = tensors["params/img/cls"] + first
    tensors["params/txt/pos_embedding"] = tensors["params/txt/pos_embedding"] + 1
    expected = embed(big_vision.read(saved(tensors, tmp_path, "new.npz")), inputs)
    ours = embed(weights, inputs)
    for part in ("image", "text"):
        np.testing.assert_allclose(ours[part], expected[part], atol=1e-6)
    # A position of the class token is written as it was once, and comes back.
    export_weights(weights, "big_vision", tmp_path / "out")


def test_preset_is_recognised(tmp_path):
    from clip_jax.config import preset

    siglip = preset("ViT-B-16-SigLIP")
    small = {"width": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": MLP / WIDTH}
    image = dataclasses.replace(siglip.image, image_size=GRID * PATCH, patch_size=PATCH, **small)
    text = dataclasses.replace(siglip.text, vocab_size=VOCAB, context_length=LENGTH, **small)
    expected = dataclasses.replace(siglip, image=image, text=text, embed_dim=WIDTH)
    weights = big_vision.read(saved(archive(), tmp_path))
    assert described(weights) == described(dataclasses.replace(weights, model=expected))


def test_tokenizer_and_interpolation_travel_beside_the_archive(tmp_path):
    captions = ["a red cat", "two blue dogs", "ein roter Hund"]
    tokenizer = Tokenizer.train(captions, vocab_size=300, lowercase=True)
    weights = big_vision.read(saved(archive(), tmp_path))
    table = np.zeros((tokenizer.vocab_size, WIDTH), np.float32)
    model = dataclasses.replace(
        weights.model,
        image=dataclasses.replace(weights.model.image, interpolation="bilinear"),
        text=dataclasses.replace(
            weights.model.text,
            vocab_size=tokenizer.vocab_size,
            eot_id=tokenizer.eot_id,
            pad_id=tokenizer.pad_id,
        ),
    )
    arrays = weights.arrays | {"text/token_embedding": table}
    weights = Weights(model=model, arrays=arrays, tokenizer=tokenizer)
    report = export_weights(weights, "big_vision", tmp_path / "out")
    assert any("tokenizer the same" in line for line in report.checks)
    again = big_vision.read(tmp_path / "out")
    assert again.model.image.interpolation == "bilinear"
    assert again.tokenizer.to_json() == tokenizer.to_json()
    assert big_vision.peer_embeddings(tmp_path, [Image.new("RGB", (8, 8))], ["a"]) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image.activation": "gelu"}, "activation='gelu'"),
        ({"text.layer_norm_epsilon": 1e-5}, "layer_norm_epsilon=1e-05"),
        ({"image.mean": (0.4, 0.4, 0.4)}, "mean="),
        ({"image.resize": "shortest"}, "resize='shortest'"),
        ({"text.causal": True}, "causal=True"),
        ({"text.pooling": "mean"}, "pooling='mean'"),
        ({"text_projection": "linear"}, "text_projection='linear'"),
        ({"image.pooling": "class_token"}, "pooling='class_token'"),
        ({"image.num_registers": 4}, "num_registers=4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_the_family_lacks_is_refused(change, message, tmp_path):
    weights = big_vision.read(saved(archive(), tmp_path))
    model = weights.model
    for path, value in change.items():
        *groups, name = path.split(".")
        if groups:
            tower = dataclasses.replace(getattr(model, groups[0]), **{name: value})
            model = dataclasses.replace(model, **{groups[0]: tower})
        else:
            model = dataclasses.replace(model, **{name: value})
    with pytest.raises(UserError, match=message):
        export_weights(dataclasses.replace(weights, model=model), "big_vision", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def broken(name, change):
    tensors = archive()
    if change == "missing":
        del tensors[name]
    elif change == "more":
        tensors[name] = np.zeros(3, np.float32)
    else:
        tensors[name] = change(tensors[name])
    return tensors


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("params/t", "missing", "lacks 't'"),
        ("params/img/pos_embedding", lambda x: x[:, :-1], "15 position embeddings"),
        ("params/img/embedding/kernel", lambda x: x[:, :, :1], r"\[P, P, 3, D\]"),
        ("params/txt/head/bias", "missing", "lack 'txt/head/bias'"),
        ("params/img/pre_logits/bias", "more", "hold 'img/pre_logits/bias'"),
        ("params/txt/Embed_0/embedding", lambda x: x * np.nan, "not finite"),
        ("params/txt/head/kernel", lambda x: x[:, :8], "text embeddings 8"),
        ("params/txt/Encoder_0/encoderblock_2/MlpBlock_0/Dense_1/bias", "missing", "lack 'txt/Enc"),
        ("elsewhere/x", "more", "holds 'elsewhere/x' beside params"),
    ],
)
def test_odd_archives_give_one_line(name, change, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        big_vision.read(saved(broken(name, change), tmp_path))
    assert "\n" not in str(caught.value)


def test_a_folder_must_hold_one_archive(tmp_path):
    with pytest.raises(UserError, match="must hold one"):
        big_vision.read(tmp_path)
    saved(archive(), tmp_path)
    assert big_vision.read(tmp_path).model.image.depth == DEPTH
    saved(archive(), tmp_path, "other.npz")
    with pytest.raises(UserError, match=r"other\.npz, siglip\.npz"):
        big_vision.read(tmp_path)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut\.npz is damaged"):
        big_vision.read(tmp_path / "cut.npz")


def test_layers_by_name_and_stacked_are_the_same(tmp_path):
    weights = big_vision.read(saved(archive(), tmp_path))
    named = write_table(big_vision._rows(weights.model, []), weights.arrays)
    stacked = write_table(big_vision._rows(weights.model, ["img", "txt"]), weights.arrays)
    name = "MultiHeadDotProductAttention_0/key/kernel"
    for layer in range(DEPTH):
        np.testing.assert_array_equal(
            stacked[f"img/Transformer/encoderblock/{name}"][layer],
            named[f"img/Transformer/encoderblock_{layer}/{name}"],
        )
