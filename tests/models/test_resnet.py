"""CLIP's ResNet against open_clip's with the same random weights."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from small import mesh_of

from clip_jax.config import ConfigError, ImageTowerConfig
from clip_jax.models import Execution, unit_length
from clip_jax.models.resnet import Bottleneck, ModifiedResNet, normalize_by_batch
from clip_jax.parallel import BATCH_AXES

CONFIG = ImageTowerConfig(
    kind="resnet", image_size=64, resnet_layers=(1, 2, 1, 1), width=8, num_heads=4
)
BATCH, EMBED_DIM = 8, 16
IMAGE = np.random.default_rng(0).standard_normal((BATCH, 64, 64, 3)).astype(np.float32)
TARGET = np.random.default_rng(1).standard_normal((BATCH, EMBED_DIM)).astype(np.float32)
TRAINING = jax.random.split(jax.random.key(0), BATCH)  # the keys of rows


def tower(config=CONFIG, execution=None):
    """Graph, and shapes of the parameters and of the statistics."""
    execution = execution or Execution()

    def split():
        model = ModifiedResNet(config, execution, embed_dim=EMBED_DIM, rngs=nnx.Rngs(0))
        return nnx.split(model, nnx.Param, nnx.BatchStat)

    return jax.eval_shape(split)


def random_like(state):
    """Random arrays as a plain dict: norms about 1, everything else about 0."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        is_norm = path[-1].key in ("scale", "var")
        return 1 + 0.3 * np.tanh(values) if is_norm else 0.05 * values

    return jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state))


def run(config, params, statistics, image, *, training, execution=None):
    """Pooled features, tokens and new statistics; to be traced."""
    graph, *states = tower(config, execution)
    for state, values in zip(states, (params, statistics), strict=True):
        nnx.replace_by_pure_dict(state, values)
    model = nnx.merge(graph, *states)
    pooled, tokens = model(image, row_keys_B=TRAINING if training else None)
    return pooled, tokens, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def train(config, params, statistics, image):
    """Loss, gradients, embeddings and new statistics of a step."""

    def loss(params):
        pooled, _, new = run(config, params, statistics, image, training=True)
        return (pooled * TARGET[: len(pooled)]).sum(), (pooled, new)

    (value, (pooled, new)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return value, gradients, pooled, new


def from_peer(values: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Arrays by open_clip's names (weights or gradients) as our parameters and statistics."""
    params: dict = {"pooling": {}}
    statistics: dict = {}

    def put(ours, convolution, norm, i):
        scope, state = params, statistics
        for name in ours:
            scope, state = scope.setdefault(name, {}), state.setdefault(name, {})
        names = ("shortcut_convolution", "shortcut_norm")
        names = (f"convolution_{i}", f"norm_{i}") if i is not None else names
        scope[names[0]] = {"kernel": values[f"{convolution}.weight"].transpose(2, 3, 1, 0)}
        scope[names[1]] = {"scale": values[f"{norm}.weight"], "bias": values[f"{norm}.bias"]}
        if f"{norm}.running_mean" in values:
            mean, var = values[f"{norm}.running_mean"], values[f"{norm}.running_var"]
            state[names[1]] = {"mean": mean, "var": var}

    for i in range(3):
        put(("stem",), f"conv{i + 1}", f"bn{i + 1}", i)
    for stage, num_blocks in enumerate(CONFIG.resnet_layers):
        for j in range(num_blocks):
            ours, peers = (f"stage_{stage}", f"block_{j}"), f"layer{stage + 1}.{j}"
            for i in range(3):
                put(ours, f"{peers}.conv{i + 1}", f"{peers}.bn{i + 1}", i)
            if j == 0:
                put(ours, f"{peers}.downsample.0", f"{peers}.downsample.1", None)
    params["pooling"]["position_embedding"] = values["attnpool.positional_embedding"]
    heads, width = CONFIG.num_heads, 32 * CONFIG.width
    for ours, peers in (("query", "q"), ("key", "k"), ("value", "v")):
        kernel, bias = (values[f"attnpool.{peers}_proj.{n}"] for n in ("weight", "bias"))
        params["pooling"][ours] = {
            "kernel": kernel.T.reshape(width, heads, -1),
            "bias": bias.reshape(heads, -1),
        }
    kernel, bias = (values[f"attnpool.c_proj.{n}"] for n in ("weight", "bias"))
    params["pooling"]["out"] = {"kernel": kernel.T.reshape(heads, -1, EMBED_DIM), "bias": bias}
    return jax.tree.map(jnp.asarray, (params, statistics))


def arrays(tensors):
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors}


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="module")
def peer_class():
    from peers import open_clip_or_skip

    open_clip_or_skip()
    from open_clip.modified_resnet import ModifiedResNet as Peer

    return Peer


@pytest.fixture(scope="module")
def peer(torch, peer_class):
    torch.manual_seed(0)
    peer = peer_class(
        list(CONFIG.resnet_layers), EMBED_DIM, CONFIG.num_heads, CONFIG.image_size, CONFIG.width
    )
    with torch.no_grad():
        for parameter in peer.parameters():
            spread = parameter.std() if parameter.ndim > 1 else 0.3
            parameter.add_(spread * torch.randn_like(parameter))
        peer.conv1.weight.mul_(0.01)  # variances of 1e-3, beside which epsilon counts
        norms = [module for module in peer.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        peer.train()(torch.randn(BATCH, 3, 64, 64))  # running statistics that are about right
        for norm in norms:
            norm.momentum = 0.1
    return peer


def peer_step(torch, peer, image):
    """Embeddings, gradients and new statistics of a step; the peer is left as it was."""
    before = {name: value.clone() for name, value in peer.state_dict().items()}
    peer.train().zero_grad()
    embeddings = peer(torch.from_numpy(image.transpose(0, 3, 1, 2).copy()))
    (embeddings * torch.from_numpy(TARGET[: len(image)])).sum().backward()
    gradients = {name: p.grad.numpy().copy() for name, p in peer.named_parameters()}
    after = arrays(peer.state_dict().items())
    peer.load_state_dict(before)
    return embeddings.detach().numpy(), from_peer(gradients)[0], from_peer(after)[1]


def assert_close(ours, expected, tolerance):
    """Each array to `tolerance` of its greatest value.

    The floor is for the bias of the keys: softmax is blind to it, its gradient is rounding alone.
    """
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True
    ):
        error = np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(b).max(), 1e-2)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error}"


def test_evaluation_equals_open_clip(torch, peer):
    params, statistics = from_peer(arrays(peer.state_dict().items()))
    with torch.no_grad():
        expected = peer.eval()(torch.from_numpy(IMAGE.transpose(0, 3, 1, 2).copy())).numpy()
    pooled, tokens, new = jax.jit(lambda *a: run(CONFIG, *a, training=False))(
        params, statistics, IMAGE
    )
    assert pooled.dtype == jnp.float32
    assert tokens.shape == (BATCH, 4, 256)
    np.testing.assert_allclose(unit_length(pooled), unit_length(jnp.asarray(expected)), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, new, statistics)


def test_training_equals_open_clip(torch, peer):
    params, statistics = from_peer(arrays(peer.state_dict().items()))
    embeddings, peer_gradients, peer_statistics = peer_step(torch, peer, IMAGE)
    _, gradients, pooled, new = jax.jit(lambda *a: train(CONFIG, *a))(params, statistics, IMAGE)
    assert_close(pooled, embeddings, 1e-5)
    assert_close(new, peer_statistics, 1e-5)
    assert_close(gradients, peer_gradients, 1e-4)


def test_local_batch_norm_is_open_clip_on_each_group(torch, peer):
    """Running statistics are linear in those of a batch: the mean over groups of open_clip's."""
    config = dataclasses.replace(CONFIG, batch_norm="local", batch_norm_group_size=4)
    params, statistics = from_peer(arrays(peer.state_dict().items()))
    _, gradients, pooled, new = jax.jit(lambda *a: train(config, *a))(params, statistics, IMAGE)
    whole_target = TARGET.copy()
    groups = []
    try:
        for rows in (slice(0, 4), slice(4, 8)):
            TARGET[:4] = whole_target[rows]
            groups.append(peer_step(torch, peer, IMAGE[rows]))
    finally:
        TARGET[:] = whole_target
    assert_close(pooled, np.concatenate([group[0] for group in groups]), 1e-5)
    assert_close(gradients, jax.tree.map(jnp.add, groups[0][1], groups[1][1]), 1e-4)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, groups[0][2], groups[1][2])
    assert_close(new, mean, 1e-5)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_one_and_eight_devices_agree(num_groups):
    """Groups of the whole batch, which lies over all devices: batch norm alone looks across rows.

    The first block of a stage, so that all four norms and both pools are in it.
    """
    x = np.random.default_rng(2).standard_normal((BATCH, 16, 16, 8)).astype(np.float32)
    x += np.arange(BATCH, dtype=np.float32)[:, None, None, None]  # rows differ in their means
    block = Bottleneck(8, 4, 2, Execution(), rngs=nnx.Rngs(0))
    graph, *states = nnx.split(block, nnx.Param, nnx.BatchStat)
    values = [random_like(state) for state in states]

    def step(params, statistics, x):
        def loss(params):
            for state, values in zip(states, (params, statistics), strict=True):
                nnx.replace_by_pure_dict(state, values)
            block = nnx.merge(graph, *states)
            y = block(x, num_groups)
            new = nnx.to_pure_dict(nnx.state(block, nnx.BatchStat))
            return jnp.sum(y * TARGET[:, None, None]), (y, new)

        return jax.grad(loss, has_aux=True)(params)

    results = []
    for num_devices in (1, 8):
        mesh = mesh_of(num_devices)
        whole = jax.NamedSharding(mesh, PartitionSpec())
        rows = jax.NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        sharded = jax.jit(step, in_shardings=(whole, whole, rows))
        results.append(jax.device_get(sharded(*values, x)))
    assert_close(results[1], results[0], 1e-5)


def test_groups_must_divide_the_rows():
    config = dataclasses.replace(CONFIG, batch_norm="local", batch_norm_group_size=3)
    params, statistics = map(random_like, tower(config)[1:])
    with pytest.raises(ConfigError, match=r"group_size 3 does not divide the 8 rows .*: 6 or 9"):
        jax.eval_shape(lambda *a: train(config, *a), params, statistics, IMAGE)


def test_every_parameter_has_a_gradient():
    _, gradients, _, _ = jax.jit(lambda *a: train(CONFIG, *a))(
        *map(random_like, tower()[1:]), IMAGE
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        if "key']['bias" in jax.tree_util.keystr(path):
            continue  # softmax is blind to it: it adds the same to all logits of a query
        assert np.abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)


def test_bfloat16_is_close_and_keeps_float32_statistics():
    params, statistics = map(random_like, tower()[1:])
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, 64, 64, 3), np.uint8)
    normalised = ((pixels / 255 - CONFIG.mean) / np.array(CONFIG.std)).astype(np.float32)
    execution = Execution(dtype=jnp.bfloat16)
    exact, _, exact_new = jax.jit(lambda *a: run(CONFIG, *a, training=True))(
        params, statistics, normalised
    )
    rounded, tokens, new = jax.jit(lambda *a: run(CONFIG, *a, training=True, execution=execution))(
        params, statistics, pixels
    )
    assert (rounded.dtype, tokens.dtype) == (jnp.float32, jnp.bfloat16)
    cosine = (unit_length(exact) * unit_length(rounded)).sum(axis=1)
    assert cosine.min() > 0.99
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}
    assert_close(new, exact_new, 0.02)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_statistics_are_exact_to_float32(dtype):
    """Deviation 0.1 about a mean of 100: E[x^2] - E[x]^2 has two digits left in float32."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(100 + 0.1 * rng.standard_normal((4, 8, 8, 3)), dtype)
    y, mean, variance = normalize_by_batch(x, jnp.ones(3), jnp.zeros(3), 1)
    exact = np.asarray(x, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(mean[0], exact.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(variance[0], exact.var(axis=0), rtol=1e-4)
    deviation = (exact.var(axis=0) / (exact.var(axis=0) + 1e-5)) ** 0.5
    np.testing.assert_allclose(np.std(y, axis=(0, 1, 2), dtype=float), deviation, rtol=5e-3)
    assert y.dtype == dtype


def test_backward_pass_keeps_the_input_alone():
    x = jnp.ones((4, 8, 8, 16), jnp.bfloat16)
    vector = jnp.ones(16)
    _, backward = jax.vjp(lambda *a: normalize_by_batch(*a, 2), x, vector, vector)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(backward))
    assert x.nbytes <= kept < 1.2 * x.nbytes


@pytest.mark.parametrize(
    ("layers", "width", "num_heads", "image_size", "embed_dim"),
    [
        ((3, 4, 6, 3), 64, 32, 224, 1024),  # RN50
        ((3, 4, 23, 3), 64, 32, 224, 512),  # RN101
        ((4, 6, 10, 6), 80, 40, 288, 640),  # RN50x4
        ((6, 8, 18, 8), 96, 48, 384, 768),  # RN50x16
        ((3, 15, 36, 10), 128, 64, 448, 1024),  # RN50x64
    ],
)
def test_released_sizes(torch, peer_class, layers, width, num_heads, image_size, embed_dim):
    """As many parameters and statistics as open_clip's, and an embedding."""
    config = dataclasses.replace(
        CONFIG, resnet_layers=layers, width=width, num_heads=num_heads, image_size=image_size
    )

    def apply(image):
        model = ModifiedResNet(config, Execution(), embed_dim=embed_dim, rngs=nnx.Rngs(0))
        return nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat), model(image)

    image = jax.ShapeDtypeStruct((2, image_size, image_size, 3), jnp.uint8)
    params, statistics, (pooled, tokens) = jax.eval_shape(apply, image)
    assert pooled.shape == (2, embed_dim)
    assert tokens.shape == (2, (image_size // 32) ** 2, 32 * width)
    with torch.device("meta"):
        peer = peer_class(list(layers), embed_dim, num_heads, image_size, width)
    for ours, tensors in (
        (params, peer.parameters()),
        (statistics, [b for name, b in peer.named_buffers() if "running" in name]),
    ):
        num_ours = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(ours))
        assert num_ours == sum(tensor.numel() for tensor in tensors)
