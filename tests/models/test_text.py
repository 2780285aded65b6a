"""Transformer text towers against transformers' SigLIP and open_clip's, with random weights."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import mesh_of

from clip_jax.config import TextTowerConfig, UserError
from clip_jax.data.packing import pack_captions
from clip_jax.models import Execution, TextTransformer, unit_length
from clip_jax.models.text import real_tokens
from clip_jax.parallel import batch_sharding, replicated

CONFIG = TextTowerConfig(
    vocab_size=64, eot_id=63, context_length=8, width=32, depth=2, num_heads=2, mlp_ratio=3.0
)
SIGLIP = dataclasses.replace(
    CONFIG,
    causal=False,
    pooling="last",
    eot_id=1,
    pad_id=1,
    activation="gelu_tanh",
    layer_norm_epsilon=1e-6,
)
# Words, the end of text, and padding; a row without padding.
TOKENS = np.random.default_rng(0).integers(2, 63, (4, 8)).astype(np.int32)
LENGTHS = (3, 5, 2, 8)
for row, length in zip(TOKENS, LENGTHS, strict=True):
    row[length - 1 :] = [63] + [0] * (8 - length)


# The same captions twice, in groups of four: one row is full, one holds two, one has padding.
ORDER = [0, 1, 2, 3, 3, 0, 1, 2]
PACKED = pack_captions(
    [TOKENS[i, : LENGTHS[i]].tolist() for i in ORDER],
    group_size=4,
    rows=4,
    row_length=8,
    pad_id=7,
)


def tower(config=CONFIG, execution=None):
    return TextTransformer(config, execution or Execution(), rngs=nnx.Rngs(0))


def model_of(config, params):
    graph, state = nnx.split(jax.eval_shape(lambda: tower(config)))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def apply(config, params, tokens):
    return model_of(config, params)(tokens)


def packed(model):
    return model.packed(PACKED.tokens, PACKED.segments, PACKED.eot)


def stacked(values, prefix, names, config):
    """The blocks of a peer, whose weights are [out, in], as ours. names: theirs for our parts."""

    def one(i):
        def linear(part):
            name = f"{prefix}.{i}.{names[part]}"
            return {"kernel": values[f"{name}.weight"].T, "bias": values[f"{name}.bias"]}

        def norm(part):
            name = f"{prefix}.{i}.{names[part]}"
            return {"scale": values[f"{name}.weight"], "bias": values[f"{name}.bias"]}

        if "qkv" in names:
            kernel, bias = (values[f"{prefix}.{i}.{names['qkv']}_{n}"] for n in ("weight", "bias"))
            kernel = kernel.T
        else:
            parts = [linear(part) for part in ("query", "key", "value")]
            kernel = np.concatenate([part["kernel"] for part in parts], axis=1)
            bias = np.concatenate([part["bias"] for part in parts])
        heads, width = config.num_heads, config.width
        qkv = {"kernel": kernel.reshape(width, 3, heads, -1), "bias": bias.reshape(3, heads, -1)}
        out = linear("out")
        out["kernel"] = out["kernel"].reshape(heads, -1, width)
        return {
            "attention_norm": norm("attention_norm"),
            "attention": {"qkv": qkv, "out": out},
            "mlp_norm": norm("mlp_norm"),
            "mlp": {"up": linear("up"), "down": linear("down")},
        }

    return jax.tree.map(lambda *leaves: np.stack(leaves), *[one(i) for i in range(config.depth)])


def weights_of(peer, torch):
    """The peer's arrays by name, after each was moved off its start at 0 or 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return {name: p.detach().numpy() for name, p in peer.named_parameters()}


@pytest.mark.parametrize("family", ["Siglip", "Siglip2"])
def test_equals_transformers_siglip(family):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)
    config = getattr(transformers, f"{family}TextConfig")(
        vocab_size=SIGLIP.vocab_size,
        hidden_size=SIGLIP.width,
        intermediate_size=96,
        num_hidden_layers=SIGLIP.depth,
        num_attention_heads=SIGLIP.num_heads,
        max_position_embeddings=SIGLIP.context_length,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=1,
    )
    peer = getattr(transformers, f"{family}TextModel")(config).eval()
    values = weights_of(peer, torch)
    names = {
        "attention_norm": "layer_norm1",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out": "self_attn.out_proj",
        "mlp_norm": "layer_norm2",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    }
    params = {
        "token_embedding": values["embeddings.token_embedding.weight"],
        "position_embedding": values["embeddings.position_embedding.weight"],
        "blocks": stacked(values, "encoder.layers", names, SIGLIP),
        "final_norm": {
            "scale": values["final_layer_norm.weight"],
            "bias": values["final_layer_norm.bias"],
        },
    }
    tokens = np.where(TOKENS == 63, 1, np.where(TOKENS == 0, 1, TOKENS))
    with torch.no_grad():
        output = peer(torch.from_numpy(tokens).long())
    pooled, features = jax.jit(lambda p: apply(SIGLIP, p, tokens))(params)
    np.testing.assert_allclose(features, output.last_hidden_state, atol=1e-5)
    head = unit_length(pooled @ values["head.weight"].T + values["head.bias"])  # the projection
    np.testing.assert_allclose(head, unit_length(output.pooler_output.numpy()), atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_equals_open_clip(causal):
    """Causal and pooled at the end of text: CLIP. Neither: CLIPA (Li et al. 2023)."""
    from peers import open_clip_or_skip

    torch, open_clip = pytest.importorskip("torch"), open_clip_or_skip()
    config = dataclasses.replace(CONFIG, causal=causal, pooling="eot" if causal else "last")
    peer = open_clip.transformer.TextTransformer(
        context_length=8,
        vocab_size=64,
        width=32,
        heads=2,
        layers=2,
        mlp_ratio=3.0,
        no_causal_mask=not causal,
        pool_type="argmax" if causal else "last",
        proj_type="none",
        output_tokens=True,
    )
    values = weights_of(peer, torch)
    names = {
        "attention_norm": "ln_1",
        "qkv": "attn.in_proj",
        "out": "attn.out_proj",
        "mlp_norm": "ln_2",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    }
    params = {
        "token_embedding": values["token_embedding.weight"],
        "position_embedding": values["positional_embedding"],
        "blocks": stacked(values, "transformer.resblocks", names, config),
        "final_norm": {"scale": values["ln_final.weight"], "bias": values["ln_final.bias"]},
    }
    with torch.no_grad():
        expected = peer.eval()(torch.from_numpy(TOKENS).long())[0].numpy()
    pooled, _ = jax.jit(lambda p: apply(config, p, TOKENS))(params)
    np.testing.assert_allclose(unit_length(pooled), unit_length(expected), atol=1e-5)
    if causal:
        pooled = jax.jit(lambda p: packed(model_of(config, p)))(params)
        np.testing.assert_allclose(unit_length(pooled), unit_length(expected[ORDER]), atol=1e-5)


def test_pooling():
    poolings = ("eot", "last", "class_token", "mean")
    towers = [tower(dataclasses.replace(CONFIG, pooling=pooling)) for pooling in poolings]
    outputs = jax.jit(lambda towers: [model(TOKENS) for model in towers])(towers)
    x = np.asarray(outputs[0][1])
    expected = {
        "eot": x[range(4), [length - 1 for length in LENGTHS]],
        "last": x[:, -1],
        "class_token": x[:, 0],
        "mean": [x[row, :length].mean(axis=0) for row, length in enumerate(LENGTHS)],
    }
    for pooling, (pooled, _) in zip(poolings, outputs, strict=True):
        np.testing.assert_allclose(pooled, expected[pooling], atol=1e-6, err_msg=pooling)


def test_real_tokens():
    config = dataclasses.replace(CONFIG, eot_id=9, pad_id=0)
    tokens = np.array([[5, 0, 9, 0, 9], [9, 9, 9, 9, 9], [5, 0, 6, 0, 0], [0, 0, 0, 0, 0]])
    expected = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(real_tokens(tokens, config), expected)
    config = dataclasses.replace(config, eot_id=None, pad_id=9)
    np.testing.assert_array_equal(real_tokens(tokens, config), tokens != 9)


def test_rows_may_be_shorter_than_the_context_and_not_longer():
    """A causal tower gives the first tokens of a row the same features."""
    model = tower()
    _, whole = jax.jit(lambda m: m(TOKENS))(model)
    _, short = jax.jit(lambda m: m(TOKENS[:, :5]))(model)
    np.testing.assert_allclose(short, whole[:, :5], atol=1e-6)
    with pytest.raises(
        UserError, match="rows of 16 tokens do not fit the tower's context_length 8"
    ):
        model(np.concatenate([TOKENS, TOKENS], axis=1))


def test_packed_captions_have_the_features_and_gradients_of_padded_ones():
    """Rows of padding alone are among them, whose tokens are words: nothing of it gets out."""
    assert (PACKED.segments == 0).all(axis=2).any()
    assert len(np.unique(PACKED.segments)) == 3
    model = tower()

    def loss(pooled):
        return (pooled**3).sum(), pooled

    @jax.jit
    def run(model):
        return (
            jax.grad(lambda m: loss(m(TOKENS[ORDER])[0]), has_aux=True)(model),
            jax.grad(lambda m: loss(packed(m)), has_aux=True)(model),
        )

    (gradients, pooled), (packed_gradients, packed_pooled) = run(model)
    assert packed_pooled.dtype == jnp.float32
    np.testing.assert_allclose(packed_pooled, pooled, atol=1e-5)
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradients)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * norm),
        packed_gradients,
        gradients,
    )


def test_packed_rows_are_no_longer_than_the_context():
    model = tower(dataclasses.replace(CONFIG, context_length=7))
    with pytest.raises(UserError, match="rows of 8 tokens do not fit"):
        packed(model)


def test_hidden_states_of_packed_captions_stay_on_their_device():
    """On eight devices what moves is the gradient of the parameters, as many bytes as they have."""
    mesh = mesh_of(data=8)
    model = jax.eval_shape(lambda: tower(dataclasses.replace(CONFIG, depth=1)))

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))

    def loss(model, tokens, segments, eot):
        pooled = model.packed(tokens, segments, eot)
        return (pooled**3).sum(), pooled

    gradient = jax.jit(
        jax.grad(loss, has_aux=True),
        in_shardings=(replicated(mesh), *3 * [batch_sharding(mesh)]),
        out_shardings=(replicated(mesh), batch_sharding(mesh)),
    )
    text = gradient.lower(model, array(16, 3, 8), array(16, 3, 8), array(16, 4)).compile().as_text()
    moved = re.findall(r" = (.*?) ([a-z-]+)\(.*replica_groups", text)
    assert {opcode.removesuffix("-start") for _, opcode in moved} == {"all-reduce"}
    shapes = [dims for result, _ in moved for dims in re.findall(r"f32\[([\d,]*)\]", result)]
    elements = sum(math.prod(int(n) for n in dims.split(",") if n) for dims in shapes)
    # The norm before the last attention has its gradient in two parts: of queries, of all tokens.
    norm = 2 * CONFIG.width
    assert elements == norm + sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": False, "pooling": "attention"},
        {"causal": False, "pooling": "mean", "activation": "quick_gelu"},
    ],
)
def test_shapes_and_every_parameter_has_a_gradient(changes):
    model = tower(dataclasses.replace(CONFIG, **changes))

    def loss(model):
        pooled, features = model(TOKENS)
        return (pooled**3).sum(), (pooled, features)

    gradients, (pooled, features) = jax.jit(jax.grad(loss, has_aux=True))(model)
    assert (pooled.shape, pooled.dtype) == ((4, 32), jnp.float32)
    assert features.shape == (4, 8, 32)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_bfloat16_sums_gradients_of_the_token_embedding_in_float32():
    """4,096 rows begin with one token: a sum of as many equal terms, which bfloat16 cannot hold."""
    config = dataclasses.replace(CONFIG, pooling="class_token", depth=1)
    tokens = np.full((4096, 2), 5, np.int32)

    def loss(model):
        pooled, features = model(tokens)
        assert features.dtype == model.execution.dtype
        assert pooled.dtype == jnp.float32
        return (pooled * jnp.arange(32)).sum()

    exact, rounded = (
        jax.jit(jax.grad(loss))(tower(config, Execution(dtype=dtype)))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    exact_D, rounded_D = (jnp.abs(m.token_embedding[5]) for m in (exact, rounded))
    np.testing.assert_allclose(rounded_D, exact_D, atol=0.03 * exact_D.max())
