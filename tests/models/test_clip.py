"""The whole model, and against transformers' CLIPModel with the same random weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import mesh_of, small_model

from clip_jax.config import ExperimentConfig, ImageTowerConfig, ModelConfig, TextTowerConfig
from clip_jax.models import CLIP, unit_length
from clip_jax.tasks import ContrastiveTask

BATCH = 8


def peer_model(model: ModelConfig):
    """A randomly initialised transformers model of the same architecture."""
    import torch
    import transformers

    shared = {"hidden_act": model.image.activation, "attention_dropout": 0.0}
    vision = transformers.CLIPVisionConfig(
        hidden_size=model.image.width,
        intermediate_size=round(model.image.width * model.image.mlp_ratio),
        num_hidden_layers=model.image.depth,
        num_attention_heads=model.image.num_heads,
        image_size=model.image.image_size,
        patch_size=model.image.patch_size,
        layer_norm_eps=model.image.layer_norm_epsilon,
        **shared,
    )
    text = transformers.CLIPTextConfig(
        vocab_size=model.text.vocab_size,
        hidden_size=model.text.width,
        intermediate_size=round(model.text.width * model.text.mlp_ratio),
        num_hidden_layers=model.text.depth,
        num_attention_heads=model.text.num_heads,
        max_position_embeddings=model.text.context_length,
        layer_norm_eps=model.text.layer_norm_epsilon,
        eos_token_id=model.text.eot_id,
        bos_token_id=1,
        pad_token_id=0,
        **shared,
    )
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=model.embed_dim
    )
    torch.manual_seed(0)
    peer = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():  # the peer starts biases and norms at 0 and 1
            if parameter.ndim:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return peer


def from_peer(values: dict[str, np.ndarray], model: ModelConfig) -> dict:
    """Arrays named as in transformers (weights or gradients) in the layout of our parameters."""

    def linear(name):
        return {"kernel": values[name + ".weight"].T, "bias": values[name + ".bias"]}

    def norm(name):
        return {"scale": values[name + ".weight"], "bias": values[name + ".bias"]}

    def block(prefix, heads):
        width = values[f"{prefix}.layer_norm1.weight"].shape[0]
        attention = f"{prefix}.self_attn"
        kernels = [values[f"{attention}.{c}_proj.weight"].T for c in "qkv"]
        biases = [values[f"{attention}.{c}_proj.bias"] for c in "qkv"]
        out = linear(f"{attention}.out_proj")
        return {
            "attention_norm": norm(f"{prefix}.layer_norm1"),
            "attention": {
                "qkv": {
                    "kernel": np.stack(kernels, 1).reshape(width, 3, heads, -1),
                    "bias": np.stack(biases).reshape(3, heads, -1),
                },
                "out": {"kernel": out["kernel"].reshape(heads, -1, width), "bias": out["bias"]},
            },
            "mlp_norm": norm(f"{prefix}.layer_norm2"),
            "mlp": {"up": linear(f"{prefix}.mlp.fc1"), "down": linear(f"{prefix}.mlp.fc2")},
        }

    def blocks(prefix, depth, heads):
        layers = [block(f"{prefix}.encoder.layers.{i}", heads) for i in range(depth)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)

    vision, text = "vision_model", "text_model"
    patch = values[f"{vision}.embeddings.patch_embedding.weight"]  # [D, 3, rows, columns]
    params = {
        "image": {
            "stem": {
                "project": {"kernel": patch.transpose(2, 3, 1, 0).reshape(-1, model.image.width)}
            },
            "class_embedding": values[f"{vision}.embeddings.class_embedding"],
            "position_embedding": values[f"{vision}.embeddings.position_embedding.weight"],
            "pre_norm": norm(f"{vision}.pre_layrnorm"),
            "blocks": blocks(vision, model.image.depth, model.image.num_heads),
            "final_norm": norm(f"{vision}.post_layernorm"),
        },
        "text": {
            "token_embedding": values[f"{text}.embeddings.token_embedding.weight"],
            "position_embedding": values[f"{text}.embeddings.position_embedding.weight"],
            "blocks": blocks(text, model.text.depth, model.text.num_heads),
            "final_norm": norm(f"{text}.final_layer_norm"),
        },
        "image_projection": {"kernel": values["visual_projection.weight"].T},
        "text_projection": {"kernel": values["text_projection.weight"].T},
        "log_logit_scale": values["logit_scale"],
    }
    return jax.tree.map(jnp.asarray, params)


def token_rows(rng: np.random.Generator, model: ModelConfig, num: int) -> np.ndarray:
    """Rows of random length: words, one end of text, then zeros."""
    text = model.text
    tokens = np.zeros((num, text.context_length), np.int32)
    for row in tokens:
        length = rng.integers(2, text.context_length + 1)
        row[: length - 1] = rng.integers(2, text.eot_id, length - 1)
        row[length - 1] = text.eot_id
    return tokens


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_loss_and_gradients_equal_transformers(activation):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = small_model()
    model = dataclasses.replace(
        model,
        image=dataclasses.replace(model.image, activation=activation),
        text=dataclasses.replace(model.text, activation=activation),
    )
    peer = peer_model(model)
    rng = np.random.default_rng(0)
    size = model.image.image_size
    image = rng.standard_normal((BATCH, size, size, 3)).astype(np.float32)
    tokens = token_rows(rng, model, BATCH)

    output = peer(
        input_ids=torch.from_numpy(tokens).long(),
        pixel_values=torch.from_numpy(image.transpose(0, 3, 1, 2)),
        return_loss=True,
    )
    output.loss.backward()
    weights = {name: p.detach().numpy() for name, p in peer.named_parameters()}
    peer_gradients = {name: p.grad.numpy() for name, p in peer.named_parameters()}

    config = ExperimentConfig(model=model, global_batch_size=BATCH, precision="float32")
    task = ContrastiveTask(config, mesh_of())
    params = from_peer(weights, model)
    batch = {"image": jnp.asarray(image), "tokens": jnp.asarray(tokens)}

    @jax.jit
    def loss_and_gradients(params):
        return jax.value_and_grad(
            lambda p: task.loss(p, {}, batch, rng=jax.random.key(0), step=0)[0]
        )(params)

    loss, gradients = loss_and_gradients(params)
    assert abs(float(loss) - output.loss.item()) < 1e-5
    embeddings = jax.jit(lambda p: task.embed(p, {}, batch))(params)
    peer_image = unit_length(jnp.asarray(output.image_embeds.detach().numpy()))
    np.testing.assert_allclose(embeddings["image"], peer_image, atol=1e-5)
    expected = from_peer(peer_gradients, model)
    assert jax.tree.structure(gradients) == jax.tree.structure(expected)
    jax.tree.map(
        lambda ours, peers: np.testing.assert_allclose(ours, peers, atol=1e-5), gradients, expected
    )


def test_unit_length_of_zero_has_a_finite_gradient():
    gradient = jax.grad(lambda x: unit_length(x).sum())(jnp.zeros((2, 4)))
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(jnp.linalg.norm(unit_length(jnp.ones((2, 4))), axis=1), 1, rtol=1e-6)


TEXT = TextTowerConfig(vocab_size=64, eot_id=63, context_length=8, width=32, depth=2, num_heads=2)
TOKENS = np.array([[1, 5, 9, 63, 0, 0, 0, 0], [1, 63, 0, 0, 0, 0, 0, 0]], np.int32)
NAFLEX = ImageTowerConfig(
    kind="naflex",
    image_size=32,
    patch_size=4,
    max_num_patches=12,
    width=32,
    depth=2,
    num_heads=2,
    class_token=False,
    pooling="attention",
)
RESNET = ImageTowerConfig(
    kind="resnet", image_size=32, width=8, num_heads=4, resnet_layers=(1, 1, 1, 1)
)


def image_inputs(config):
    rng = np.random.default_rng(0)
    if config.kind != "naflex":
        size = config.image_size
        return {"image": rng.integers(0, 256, (2, size, size, 3), np.uint8)}
    mask = np.arange(12) < np.array([[12], [6]])
    shapes = np.array([(3, 4), (2, 3)], np.int32)
    patches = rng.integers(0, 256, (2, 12, 48), np.uint8)
    return {"patches": patches, "patch_mask": mask, "spatial_shapes": shapes}


@pytest.mark.parametrize(
    ("image", "text", "expected"),
    [
        (small_model().image, TEXT, ("VisionTransformer", "TextTransformer")),
        (
            NAFLEX,
            dataclasses.replace(TEXT, kind="bert", pooling="class_token"),
            ("NaFlexTransformer", "BertTransformer"),
        ),
        (
            RESNET,
            dataclasses.replace(TEXT, kind="cbow", pooling="mean"),
            ("ModifiedResNet", "BagOfWords"),
        ),
    ],
)
def test_every_kind_of_tower_meets_in_unit_length(image, text, expected):
    projection = "none" if image.kind == "resnet" else "linear"
    config = small_model(image=image, text=text, image_projection=projection)
    model = jax.jit(lambda: CLIP(config, rngs=nnx.Rngs(0)))()
    assert (type(model.image).__name__, type(model.text).__name__) == expected
    for embeddings in (
        jax.jit(CLIP.encode_image)(model, image_inputs(image)),
        jax.jit(CLIP.encode_text)(model, {"tokens": TOKENS}),
    ):
        assert embeddings.shape == (2, 16)
        assert embeddings.dtype == jnp.float32
        np.testing.assert_allclose(jnp.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
        assert not np.allclose(embeddings[0], embeddings[1], atol=1e-3)


@functools.partial(jax.jit, static_argnames="training")
def encoded(model, inputs, keys_B, *, training):
    """Embeddings, and the batch statistics after them."""
    embeddings = model.encode_image(inputs, row_keys_B=keys_B if training else None)
    return embeddings, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


@pytest.mark.parametrize(
    "image",
    [dataclasses.replace(small_model().image, patch_dropout=0.5), RESNET],
    ids=["patch dropout", "resnet"],
)
def test_row_keys_reach_the_image_tower(image):
    """Patches are dropped and batch statistics replaced where they are given, and nowhere else."""
    keys = jax.random.split(jax.random.key(0), 2)
    model = jax.jit(lambda: CLIP(small_model(image=image), rngs=nnx.Rngs(0)))()
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    evaluated, unchanged = encoded(model, image_inputs(image), keys, training=False)
    jax.tree.map(np.testing.assert_array_equal, before, unchanged)
    trained, after = encoded(model, image_inputs(image), keys, training=True)
    assert not np.allclose(trained, evaluated, atol=1e-3)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves(changed))
    assert bool(changed) == (image.kind == "resnet")


def test_projections():
    """Against NumPy, on the features that the towers give."""
    for kind in ("none", "linear", "linear_bias", "mlp"):
        width = 16 if kind == "none" else 32
        text = dataclasses.replace(TEXT, width=width)
        model = CLIP(small_model(text=text, text_projection=kind), rngs=nnx.Rngs(0))
        pooled, _ = model.text(TOKENS)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param)).get("text_projection")
        if kind == "none":
            assert params is None
            expected = np.asarray(pooled)
        elif kind == "mlp":
            assert params["up"]["kernel"].shape == (32, 24)
            hidden = jax.nn.gelu(np.asarray(pooled) @ params["up"]["kernel"], approximate=False)
            expected = hidden @ params["down"]["kernel"]
            assert set(params["up"]) == {"kernel"}
        else:
            expected = np.asarray(pooled) @ params["kernel"]
            if kind == "linear_bias":
                model.text_projection.bias[...] = jnp.arange(16.0)
                expected = expected + np.arange(16)
            else:
                assert set(params) == {"kernel"}
        found = model.encode_text({"tokens": TOKENS})
        np.testing.assert_allclose(
            found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5
        )


def test_logit_scale_and_bias_start_as_configured():
    model = CLIP(small_model(logit_scale_init=10.0, logit_bias_init=-10.0), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(model.logit_scale(), 10, rtol=1e-6)
    assert model.logit_bias[...] == -10
    assert CLIP(small_model(), rngs=nnx.Rngs(0)).logit_bias is None
