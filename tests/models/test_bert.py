"""The BERT tower against transformers' BertModel with the same random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clip_jax.config import TextTowerConfig, UserError
from clip_jax.models import Execution, unit_length
from clip_jax.models.bert import BertTransformer

CONFIG = TextTowerConfig(
    kind="bert",
    causal=False,
    vocab_size=64,
    context_length=10,
    eot_id=None,
    pad_id=0,
    pooling="class_token",
    width=32,
    depth=2,
    num_heads=2,
    layer_norm_epsilon=1e-12,
)
LENGTHS = (3, 8, 1, 5)
TOKENS = np.random.default_rng(0).integers(1, 64, (4, 8)).astype(np.int32)
TOKENS *= np.arange(8) < np.array(LENGTHS)[:, None]
TARGET = np.random.default_rng(1).standard_normal((4, 32)).astype(np.float32)


def tower(config=CONFIG, execution=None):
    return BertTransformer(config, execution or Execution(), rngs=nnx.Rngs(0))


def apply(config, params, tokens):
    graph, state = nnx.split(jax.eval_shape(lambda: tower(config)))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(tokens)


def from_peer(values: dict[str, np.ndarray]) -> dict:
    """Arrays by the names of transformers (weights or gradients) as our parameters."""

    def linear(name):
        return {"kernel": values[f"{name}.weight"].T, "bias": values[f"{name}.bias"]}

    def norm(name):
        return {"scale": values[f"{name}.weight"], "bias": values[f"{name}.bias"]}

    def block(i):
        prefix, heads, width = f"encoder.layer.{i}", CONFIG.num_heads, CONFIG.width
        parts = [linear(f"{prefix}.attention.self.{name}") for name in ("query", "key", "value")]
        out = linear(f"{prefix}.attention.output.dense")
        return {
            "attention": {
                "qkv": {
                    "kernel": np.stack([p["kernel"] for p in parts], 1).reshape(
                        width, 3, heads, -1
                    ),
                    "bias": np.stack([p["bias"] for p in parts]).reshape(3, heads, -1),
                },
                "out": {"kernel": out["kernel"].reshape(heads, -1, width), "bias": out["bias"]},
            },
            "attention_norm": norm(f"{prefix}.attention.output.LayerNorm"),
            "mlp": {
                "up": linear(f"{prefix}.intermediate.dense"),
                "down": linear(f"{prefix}.output.dense"),
            },
            "mlp_norm": norm(f"{prefix}.output.LayerNorm"),
        }

    params = {
        "token_embedding": values["embeddings.word_embeddings.weight"],
        "position_embedding": values["embeddings.position_embeddings.weight"],
        "segment_embedding": values["embeddings.token_type_embeddings.weight"],
        "embedding_norm": norm("embeddings.LayerNorm"),
        "blocks": jax.tree.map(
            lambda *leaves: np.stack(leaves), *[block(i) for i in range(CONFIG.depth)]
        ),
    }
    if "pooler.dense.weight" in values:
        params["pooler"] = linear("pooler.dense")
    return params


@pytest.mark.parametrize(
    "changes", [{}, {"pooler": True}, {"pooling": "mean"}], ids=["class_token", "pooler", "mean"]
)
def test_embeddings_and_gradients_equal_transformers(changes):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)
    config = dataclasses.replace(CONFIG, **changes)
    torch.manual_seed(0)
    peer_config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    peer = transformers.BertModel(peer_config, add_pooling_layer=config.pooler).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    params = from_peer({name: p.detach().numpy() for name, p in peer.named_parameters()})

    tokens = torch.from_numpy(TOKENS).long()
    mask = (tokens != 0).long()
    output = peer(tokens, attention_mask=mask)
    expected = output.last_hidden_state[:, 0]
    if config.pooler:
        expected = output.pooler_output
    elif config.pooling == "mean":
        expected = (output.last_hidden_state * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    (expected * torch.from_numpy(TARGET)).sum().backward()
    peer_gradients = from_peer({name: p.grad.numpy() for name, p in peer.named_parameters()})

    def loss(params):
        pooled, features = apply(config, params, TOKENS)
        return (pooled * TARGET).sum(), (pooled, features)

    gradients, (pooled, features) = jax.jit(jax.grad(loss, has_aux=True))(params)
    is_real = TOKENS != 0
    last_hidden = output.last_hidden_state.detach().numpy()
    np.testing.assert_allclose(features[is_real], last_hidden[is_real], atol=1e-5)
    expected = unit_length(jnp.asarray(expected.detach().numpy()))
    np.testing.assert_allclose(unit_length(pooled), expected, atol=1e-5)
    assert jax.tree.structure(gradients) == jax.tree.structure(peer_gradients)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(np.abs(b).max(), 0.1)),
        gradients,
        peer_gradients,
    )


@pytest.mark.parametrize("changes", [{"pooler": True}, {"pooling": "mean"}])
def test_shapes_and_every_parameter_has_a_gradient(changes):
    execution = Execution(dtype=jnp.bfloat16)
    model = tower(dataclasses.replace(CONFIG, **changes), execution)

    def loss(model):
        pooled, features = model(TOKENS)
        return (pooled**3 * TARGET).sum(), (pooled, features)

    gradients, (pooled, features) = jax.jit(jax.grad(loss, has_aux=True))(model)
    assert (pooled.shape, pooled.dtype) == ((4, 32), jnp.float32)
    assert (features.shape, features.dtype) == ((4, 8, 32), jnp.bfloat16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_a_row_of_padding_alone_is_finite():
    model = tower(dataclasses.replace(CONFIG, pooling="mean"))
    tokens = np.zeros((2, 8), np.int32)

    def loss(model):
        pooled, features = model(tokens)
        return (pooled**2).sum() + (features**2).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(model)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_rows_longer_than_the_positions_are_refused():
    with pytest.raises(UserError, match=r"rows of 11 tokens do not fit .* 10"):
        tower()(np.ones((1, 11), np.int32))
