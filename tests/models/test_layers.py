import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models.vision_peers import with_params
from small import small_model

from clip_jax.config import ConfigError, ImageTowerConfig, TextTowerConfig
from clip_jax.models import Execution
from clip_jax.models.blocks import Block, PostNormBlock, run_blocks, stacked_blocks
from clip_jax.models.layers import ACTIVATIONS, attention

CONFIG = small_model().image
LENGTHS = np.array([5, 1, 7, 3])


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_params(make, seed=0):
    """Parameters of what `make` makes, all of them random and of order one."""
    state = nnx.to_pure_dict(nnx.split(jax.eval_shape(make))[1])
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, max(x.shape[0], 4) ** -0.5, x.shape), x.dtype), state
    )


def test_attention_with_lengths_is_that_of_the_shortened_rows():
    q, k, v = (tokens(4, 7, 2, 8, seed=i) for i in range(3))
    found = attention(
        q, k, v, is_causal=False, execution=Execution(), lengths_B=jnp.asarray(LENGTHS)
    )
    for i, length in enumerate(LENGTHS):
        row = slice(i, i + 1)
        expected = attention(
            q[row], k[row, :length], v[row, :length], is_causal=False, execution=Execution()
        )
        np.testing.assert_allclose(found[row], expected, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"is_causal": False, "lengths_B": jnp.asarray(LENGTHS)},
        {"is_causal": True, "segments_BS": jnp.array([[1, 1, 2, 2, 2, 3, 0]] * 4)},
    ],
    ids=["causal", "lengths", "segments"],
)
def test_attention_equals_that_of_jax(options):
    """In bfloat16 the gradients differ by roundings of it, and no more."""
    segments = options.get("segments_BS")
    same = (
        {} if segments is None else {"mask": segments[:, None, :, None] == segments[:, None, None]}
    )
    execution = Execution()

    def ours(q, k, v):
        return attention(q, k, v, execution=execution, **options).astype(jnp.float32)

    def theirs(q, k, v):
        return jax.nn.dot_product_attention(
            *(q, k, v),
            is_causal=options["is_causal"],
            key_value_seq_lengths=options.get("lengths_B"),
            **same,
        ).astype(jnp.float32)

    inputs = [tokens(4, 7, 2, 8, seed=i) for i in range(3)]
    up = tokens(4, 7, 2, 8, seed=3)
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)):
        x = [jnp.asarray(value, dtype) for value in inputs]
        found, back = jax.vjp(ours, *x)
        expected, back_of_jax = jax.vjp(theirs, *x)
        np.testing.assert_allclose(found, expected, atol=tolerance)
        for one, other in zip(back(up), back_of_jax(up), strict=True):
            assert one.dtype == dtype
            scale = np.abs(other.astype(jnp.float32)).max()
            np.testing.assert_allclose(
                one.astype(jnp.float32), other.astype(jnp.float32), atol=tolerance * scale
            )


def test_attention_of_a_row_without_keys_is_finite():
    """As if its first key were real; the gradients are finite too."""
    q, k, v = (tokens(2, 3, 1, 8, seed=i) for i in range(3))

    def run(q, k, v):
        lengths = jnp.array([0, 2])
        return attention(q, k, v, is_causal=False, execution=Execution(), lengths_B=lengths)

    np.testing.assert_allclose(run(q, k, v)[0], np.broadcast_to(v[0, :1], v[0].shape), rtol=1e-6)
    gradients = jax.grad(lambda *x: (run(*x) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("post_norm", [False, True])
def test_block_equals_torch(post_norm):
    """torch's TransformerEncoderLayer, which has both orders of the norms, on padded rows."""
    torch = pytest.importorskip("torch")
    config = TextTowerConfig(width=32, num_heads=4, mlp_ratio=2.0, layer_norm_epsilon=1e-5)
    block = PostNormBlock if post_norm else Block

    def make():
        return block(config, Execution(), is_causal=False, rngs=nnx.Rngs(0))

    params = random_params(make)
    attend, mlp = params["attention"], params["mlp"]
    peer = torch.nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=not post_norm
    )
    values = {
        "self_attn.in_proj_weight": attend["qkv"]["kernel"].reshape(32, 96).T,
        "self_attn.in_proj_bias": attend["qkv"]["bias"].reshape(96),
        "self_attn.out_proj.weight": attend["out"]["kernel"].reshape(32, 32).T,
        "self_attn.out_proj.bias": attend["out"]["bias"],
        "linear1.weight": mlp["up"]["kernel"].T,
        "linear1.bias": mlp["up"]["bias"],
        "linear2.weight": mlp["down"]["kernel"].T,
        "linear2.bias": mlp["down"]["bias"],
        "norm1.weight": params["attention_norm"]["scale"],
        "norm1.bias": params["attention_norm"]["bias"],
        "norm2.weight": params["mlp_norm"]["scale"],
        "norm2.bias": params["mlp_norm"]["bias"],
    }
    peer.load_state_dict({name: torch.tensor(np.array(x)) for name, x in values.items()})
    x = tokens(4, 7, 32)
    real = np.arange(7) < LENGTHS[:, None]
    expected = peer(torch.tensor(x), src_key_padding_mask=torch.tensor(~real)).detach().numpy()
    found = with_params(make, params)(x, jnp.asarray(LENGTHS))
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], atol=2e-5)


def test_options_of_a_block_equal_torch():
    """QK-norm, LayerScale and SwiGLU, written out with torch's functions."""
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(
        CONFIG, qk_norm=True, layer_scale_init=1e-5, activation="swiglu", mlp_ratio=8 / 3
    )

    def make():
        return Block(config, Execution(), is_causal=False, rngs=nnx.Rngs(0))

    params = random_params(make)
    assert params["mlp"]["gate"]["kernel"].shape == (32, 85)
    x = tokens(2, 6, 32)
    p = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), params)
    functional = torch.nn.functional

    def norm(x, q, width):
        return functional.layer_norm(x, (width,), q["scale"], q["bias"], 1e-5)

    def linear(x, q):
        return x @ q["kernel"] + q["bias"]

    y = torch.tensor(x)
    normed = norm(y, p["attention_norm"], 32)
    qkv = torch.einsum("btd,dcnh->cbnth", normed, p["attention"]["qkv"]["kernel"])
    q, k, v = qkv + p["attention"]["qkv"]["bias"][:, None, :, None]
    q = norm(q, p["attention"]["query_norm"], 16)
    k = norm(k, p["attention"]["key_norm"], 16)
    mixed = functional.scaled_dot_product_attention(q, k, v)
    out = torch.einsum("bnth,nhd->btd", mixed, p["attention"]["out"]["kernel"])
    y = y + p["attention_scale"] * (out + p["attention"]["out"]["bias"])
    normed = norm(y, p["mlp_norm"], 32)
    hidden = functional.silu(linear(normed, p["mlp"]["gate"])) * linear(normed, p["mlp"]["up"])
    y = y + p["mlp_scale"] * linear(hidden, p["mlp"]["down"])
    np.testing.assert_allclose(with_params(make, params)(x), y.numpy(), atol=2e-5)


def test_layer_scale_starts_as_configured():
    config = dataclasses.replace(CONFIG, layer_scale_init=1e-5)
    blocks = stacked_blocks(config, Execution(), is_causal=False, rngs=nnx.Rngs(0))
    for scale in (blocks.attention_scale, blocks.mlp_scale):
        np.testing.assert_array_equal(scale[...], np.full((2, 32), 1e-5, np.float32))
        assert scale[...].dtype == jnp.float32


EXECUTIONS = [
    Execution(flat_products=True),
    Execution(unroll_layers=True),
    Execution(remat="full"),
    Execution(remat="dots", unroll_layers=True),
    Execution(remat="offload"),
]


def test_unrolled_and_rematerialised_layers_equal_the_scan():
    config = ImageTowerConfig(
        width=32, depth=3, num_heads=2, activation="swiglu", qk_norm=True, layer_scale_init=0.5
    )
    x, lengths = tokens(4, 7, 32), jnp.asarray(LENGTHS)

    def run(execution):
        blocks = stacked_blocks(config, execution, is_causal=False, rngs=nnx.Rngs(0))

        def loss(blocks, x):
            y = run_blocks(blocks, x, depth=3, execution=execution, lengths_B=lengths)
            return jnp.where(np.arange(7)[:, None] < lengths[:, None, None], y**2, 0).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(blocks, x)

    expected = jax.tree.leaves(run(Execution()))
    for execution in EXECUTIONS:
        found = jax.tree.leaves(run(execution))
        for ours, reference in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("argument", ["blocks and tokens", "tokens"])
def test_gradients_of_unrolled_layers_come_layer_by_layer(remat, argument):
    """One barrier to a layer holds its gradients together, and costs no product more."""
    blocks = stacked_blocks(CONFIG, Execution(), is_causal=False, rngs=nnx.Rngs(0))
    argnums = (0, 1) if argument == "blocks and tokens" else 1

    def compiled(unroll):
        execution = Execution(unroll_layers=unroll, remat=remat)

        def loss(blocks, x):
            return run_blocks(blocks, x, depth=CONFIG.depth, execution=execution).sum()

        x = tokens(2, 5, CONFIG.width)
        lowered = jax.jit(jax.grad(loss, argnums)).lower(blocks, x)
        barriers = lowered.as_text().count("stablehlo.optimization_barrier")
        return barriers, lowered.compile().as_text().count(" dot(")

    (barriers, products), (others, of_scan) = compiled(unroll=True), compiled(unroll=False)
    assert barriers == 1 + (remat == "full")  # in a function that is called for each layer
    assert others == 0
    assert products <= CONFIG.depth * of_scan


def test_how_to_execute_follows_backend_and_config():
    assert not Execution.for_backend("tpu").unroll_layers
    assert Execution.for_backend("gpu").unroll_layers  # the scan copies its carry there
    assert not Execution.for_backend("gpu", layers="scan").unroll_layers
    assert not Execution.for_backend("gpu", remat="offload").unroll_layers
    assert Execution.for_backend("cpu", layers="unroll").unroll_layers
    assert Execution.for_backend("cpu").flat_products
    assert not Execution.for_backend("tpu").flat_products
    with pytest.raises(ConfigError, match="'some'; there are none, dots, full, offload"):
        Execution.for_backend("cpu", remat="some")
    with pytest.raises(ConfigError, match=r"config.layers is 'roll'; there are auto, scan, unroll"):
        Execution.for_backend("cpu", layers="roll")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("7.5", "xla"), ("8.0", "cudnn"), ("10.3", "cudnn"), ("gfx942:sramecc+:xnack-", "xla")],
)
def test_cudnn_attends_on_gpus_that_have_it(capability, expected):
    device = types.SimpleNamespace(compute_capability=capability)

    def attention_of(backend, precision="bfloat16", device=device):
        return Execution.for_backend(backend, precision=precision, device=device).attention

    assert attention_of("gpu") == expected
    assert attention_of("gpu", device=None) == "cudnn"
    assert attention_of("gpu", precision="float32") == "xla"
    assert attention_of("cpu", device=jax.devices()[0]) == "xla"


def test_frozen_layers_get_no_gradients_and_keep_nothing():
    """The others get those that they have anyway; what is kept is that of fewer layers."""
    config = dataclasses.replace(CONFIG, depth=4)
    blocks = stacked_blocks(config, Execution(), is_causal=False, rngs=nnx.Rngs(0))
    x = tokens(8, 33, 32)

    def gradients(frozen):
        execution = Execution(frozen_layers=frozen)

        def loss(blocks, x):
            return (run_blocks(blocks, x, depth=4, execution=execution) ** 2).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(blocks, x).compile()
        return compiled(blocks, x), compiled.memory_analysis().temp_size_in_bytes

    (all_blocks, all_x), all_bytes = gradients(0)
    (some_blocks, some_x), some_bytes = gradients(3)
    for found, expected in zip(
        jax.tree.leaves(some_blocks), jax.tree.leaves(all_blocks), strict=True
    ):
        assert not found[:3].any()
        np.testing.assert_allclose(found[3:], expected[3:], rtol=1e-4, atol=1e-4)
    assert not some_x.any()
    assert all_x.any()
    assert some_bytes < all_bytes / 2
    (none, _), _ = gradients(4)
    assert not any(leaf.any() for leaf in jax.tree.leaves(none))


def test_layers_are_applied_in_order():
    """The scan against a loop over the layers of the stack."""
    blocks = stacked_blocks(CONFIG, Execution(), is_causal=True, rngs=nnx.Rngs(0))
    x = expected = tokens(2, 5, 32)
    for i in range(CONFIG.depth):
        expected = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)(expected)
    found = run_blocks(blocks, x, depth=CONFIG.depth, execution=Execution())
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "peer"),
    [("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("quick_gelu", "quick_gelu")],
)
def test_activations_equal_transformers(name, peer):
    torch = pytest.importorskip("torch")
    activations = pytest.importorskip("transformers.activations")
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected = activations.ACT2FN[peer](torch.tensor(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](x), expected, atol=1e-6)
