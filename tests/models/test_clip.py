"""The whole model against transformers' CLIPModel with the same random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import mesh_of, small_model

from clip_jax.config import ExperimentConfig, ModelConfig
from clip_jax.models import unit_length
from clip_jax.tasks import ContrastiveTask

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BATCH = 8


def peer_model(model: ModelConfig):
    """A randomly initialised transformers model of the same architecture."""
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
