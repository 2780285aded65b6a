"""The rules beside their peers, and what holds for all of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict
from parallel.test_sharding import FAMILIES, TOWERS, model_of, shrunk
from small import mesh_of, small_config, small_model

from clip_jax.config import ExperimentConfig, OptimizerConfig, ScheduleConfig, TowerRateConfig
from clip_jax.parallel import matching_rules, state_shardings
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import decay_mask, make_optimizer
from clip_jax.training.rates import map_with_path
from clip_jax.training.schedule import make_schedule

RULES = ("adamw", "lion", "adafactor", "sgd", "muon")


def named(tree):
    leaves = {}
    map_with_path(lambda path, leaf: leaves.update({path: leaf}), tree)
    return leaves


def config_of(*, schedule=None, **optimizer):
    schedule = schedule or ScheduleConfig(name="linear", warmup_steps=2)
    return small_config(optimizer=OptimizerConfig(**optimizer), schedule=schedule, num_steps=8)


# Of the small model what differs in kind: each array more is more to compile.
KEPT = (
    "image/stem/project/kernel",
    "image/class_embedding",
    "image/blocks/attention/qkv/kernel",
    "image/blocks/attention/out/kernel",
    "image/blocks/mlp/up/kernel",
    "image/blocks/mlp/up/bias",
    "image_projection/kernel",
    "text/blocks/mlp/down/kernel",
    "text/final_norm/scale",
    "text/token_embedding",
    "log_logit_scale",
)


@functools.cache
def _small_params():
    params, _ = jax.jit(ContrastiveTask(small_config(), mesh_of()).init)(jax.random.key(0))
    return named(jax.device_get(params))


def small_params(kept=KEPT):
    """Some parameters of the small model, on the host."""
    return unflatten_dict({path: _small_params()[path].copy() for path in kept}, sep="/")


def random_like(tree, seed, scale=0.1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(np.float32), tree)


def run(config, params, gradients, *, mesh=None, trainable=None):
    """Parameters and state after one update for each of `gradients`."""
    return runs(config, params, [gradients], mesh=mesh, trainable=trainable)[0]


def runs(config, params, several, *, mesh=None, trainable=None):
    """What `run` gives for each of `several` lists of gradients, by one compiled update."""
    optimizer = make_optimizer(config, trainable, mesh=mesh)
    init, shardings = optimizer.init, None
    if mesh is not None:
        abstract = jax.eval_shape(init, params)
        shardings = tuple(state_shardings(tree, mesh) for tree in (params, abstract))
        params = jax.device_put(params, shardings[0])
        init = jax.jit(init, out_shardings=shardings[1])

    def update(params, state, gradient, step):
        updates, state = optimizer.update(gradient, state, params, step=step)
        return optax.apply_updates(params, updates), state

    update = jax.jit(update, out_shardings=shardings)
    results = []
    for gradients in several:
        moved, state = params, init(params)
        for step, gradient in enumerate(gradients):
            moved, state = update(moved, state, gradient, jnp.int32(step))
        results.append((jax.device_get(moved), state))
    return results


def test_adamw_is_torchs():
    """Four steps of changing gradients and learning rate, with decay of all but the bias."""
    torch = pytest.importorskip("torch")
    config = config_of(learning_rate=0.1, weight_decay=0.3, epsilon=1e-3, clip_global_norm=None)
    params = {"mlp": random_like({"kernel": np.zeros((3, 4)), "bias": np.zeros(4)}, 0, 1.0)}
    gradients = [random_like(params, seed) for seed in range(1, 5)]
    got, _ = run(config, params, gradients)
    there = {name: torch.nn.Parameter(torch.tensor(leaf)) for name, leaf in params["mlp"].items()}
    groups = [
        {"params": [there["kernel"]], "weight_decay": 0.3},
        {"params": [there["bias"]], "weight_decay": 0.0},
    ]
    peer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-3)
    schedule = make_schedule(config)
    for step, gradient in enumerate(gradients):
        for group in peer.param_groups:
            group["lr"] = float(schedule(step))
        for name, parameter in there.items():
            parameter.grad = torch.tensor(gradient["mlp"][name])
        peer.step()
    for name, parameter in there.items():
        np.testing.assert_allclose(got["mlp"][name], parameter.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("name", ["lion", "sgd"])
def test_lion_and_sgd_are_optaxs(name):
    config = config_of(
        name=name, learning_rate=0.01, weight_decay=0.5, clip_global_norm=0.2, b2=0.99
    )
    params = {"mlp": random_like({"kernel": np.zeros((3, 4)), "bias": np.zeros(4)}, 0, 1.0)}
    gradients = [random_like(params, seed) for seed in range(1, 5)]
    got, _ = run(config, params, gradients)
    schedule, mask = make_schedule(config), {"mlp": {"kernel": True, "bias": False}}
    rule = {
        "lion": optax.lion(schedule, b1=0.9, b2=0.99, weight_decay=0.5, mask=mask),
        "sgd": optax.chain(
            optax.trace(0.9),
            optax.add_decayed_weights(0.5, mask),
            optax.scale_by_learning_rate(schedule),
        ),
    }[name]
    peer = optax.chain(optax.clip_by_global_norm(0.2), rule)
    wanted, state = params, peer.init(params)
    for gradient in gradients:
        updates, state = peer.update(gradient, state, wanted)
        wanted = optax.apply_updates(wanted, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, wanted)


def test_adafactor_has_momentum_and_decay_as_big_vision():
    """A vector, by hand: signs first, an average that starts at 0, the decay of matrices alone."""
    config = config_of(
        name="adafactor",
        learning_rate=0.1,
        b1=0.75,
        b2=0.999,
        weight_decay=0.5,
        clip_global_norm=None,
        schedule=ScheduleConfig(name="constant", warmup_steps=0),
    )
    params = {"mlp": {"kernel": np.array([2.0, -3.0]), "bias": np.array([4.0])}}
    params = jax.tree.map(np.float32, params)
    gradients = jax.tree.map(lambda p: np.float32([5.0, -0.1][: p.size]), params)
    got, _ = run(config, params, [gradients])
    np.testing.assert_allclose(got["mlp"]["kernel"], [2 - 0.125, -3 + 0.175], rtol=1e-5)
    np.testing.assert_allclose(got["mlp"]["bias"], [4 - 0.025], rtol=1e-5)


@pytest.mark.parametrize(
    "name", [*RULES[2:], *(pytest.param(name, marks=pytest.mark.slow) for name in RULES[:2])]
)
def test_eight_devices_move_the_weights_as_one(name):
    config, params = config_of(name=name, learning_rate=0.01), small_params(KEPT[2:6] + KEPT[-2:])
    gradients = [random_like(params, seed) for seed in range(2)]
    one, _ = run(config, params, gradients)
    eight, state = run(config, params, gradients, mesh=mesh_of(2, 2, 2))
    # Newton-Schulz makes rounding of small singular values larger: by 3.4 each of five times.
    tolerance = {"muon": 2e-5}.get(name, 2e-6)
    for path, leaf in named(one).items():
        np.testing.assert_allclose(named(eight)[path], leaf, atol=tolerance, err_msg=path)
        assert not np.array_equal(leaf, named(params)[path])
    for path, leaf in named(state).items():
        if path.endswith("mlp/up/kernel"):
            assert leaf.sharding.shard_shape(leaf.shape) == (2, 16, 64), path


@pytest.mark.parametrize("name", RULES)
def test_the_first_moment_in_bfloat16(name):
    """The second stays float32, and what the weights do is nearly the same."""
    kernel, finals = np.zeros((2, 32, 32)), []
    params = random_like({"image": {"blocks": {"mlp": {"up": {"kernel": kernel}}}}}, 0)
    gradients = [random_like(params, seed) for seed in range(1, 4)]
    for dtype in ("float32", "bfloat16"):
        config = config_of(name=name, learning_rate=0.01, first_moment_dtype=dtype)
        final, state = run(config, params, gradients)
        finals.append(final)
        kinds = set()
        for path, leaf in named(state).items():
            first = "/mu/" in path or "/trace/" in path or "/ema/" in path
            wanted = dtype if first else "int32" if path.endswith("count") else "float32"
            assert leaf.dtype == wanted, path
            kinds.add(first)
        assert True in kinds
    moved = optax.tree.norm(optax.tree.sub(finals[0], params))
    apart = optax.tree.norm(optax.tree.sub(finals[0], finals[1]))
    assert apart < 0.15 * moved
    assert apart > 0 or name == "lion"  # of which three signs seldom turn


@pytest.mark.parametrize("name", ["adafactor", "sgd"])
def test_no_momentum_no_state_of_it(name):
    state = jax.eval_shape(make_optimizer(config_of(name=name, b1=0.0)).init, small_params())
    assert not [path for path in named(state) if "/ema/" in path or "/trace/" in path]


@pytest.mark.parametrize("name", RULES)
def test_what_is_frozen_stays_to_the_bit(name):
    """By pattern, by layer and by the task: no gradient, decay or clipping knows of it."""
    config = config_of(
        name=name,
        learning_rate=0.01,
        weight_decay=10.0,
        clip_global_norm=1.0,
        frozen=("text/blocks/mlp/.*", "image_projection/kernel"),
        image=TowerRateConfig(frozen_layers=1, layer_decay=0.5),
    )
    params = small_params()
    params["text"]["blocks"]["mlp"]["down"]["kernel"][0, 0, 0] = -0.0
    params["image"]["blocks"]["mlp"]["up"]["kernel"][0, 0, 0] = -0.0
    gradients = random_like(params, 1)
    gone = dict(gradients) | {"image_projection": {"kernel": np.full((32, 16), np.nan, np.float32)}}
    gone["image"] = jax.tree.map(np.copy, gradients["image"])
    for leaf in jax.tree.leaves(gone["image"]["blocks"]):
        leaf[0] = np.inf
    trainable = lambda path: path != "text/final_norm/scale"  # noqa: E731
    several = [[gone, gradients], [gradients, gradients]]
    (got, state), (clean, _) = runs(config, params, several, trainable=trainable)
    jax.tree.map(np.testing.assert_array_equal, got, clean)
    before, after = named(params), named(got)
    for path, leaf in after.items():
        whole = path.startswith(("text/blocks/mlp", "image_projection", "text/final_norm/scale"))
        if whole or path.startswith(("image/stem", "image/class")):
            assert leaf.tobytes() == before[path].tobytes(), path
            assert not [p for p in named(state) if p.endswith("/" + path)], path
        elif path.startswith("image/blocks"):
            assert leaf[0].tobytes() == before[path][0].tobytes(), path
            assert not np.array_equal(leaf[1], before[path][1]), path
        else:
            assert not np.array_equal(leaf, before[path]), path


def test_the_norm_that_clips_counts_what_trains():
    common = {"name": "sgd", "b1": 0.0, "learning_rate": 1.0, "weight_decay": 0.0}
    constant = ScheduleConfig(name="constant", warmup_steps=0)
    params = {
        "mlp": {"kernel": np.ones(2, np.float32)},
        "other": {"kernel": np.ones(2, np.float32)},
    }
    gradients = {"mlp": {"kernel": np.float32([3, 4])}, "other": {"kernel": np.float32([300, 0])}}
    for frozen, wanted in (((), [1 - 0.01, 1 - 4 / 300]), (("other/.*",), [1 - 0.6, 1 - 0.8])):
        got, _ = run(config_of(**common, schedule=constant, frozen=frozen), params, [gradients])
        np.testing.assert_allclose(got["mlp"]["kernel"], wanted, rtol=1e-3)


def test_layers_learn_at_their_own_rates():
    """Lion's updates are signs: their size is the learning rate."""
    constant = ScheduleConfig(name="constant", warmup_steps=0)
    rates = {"image": TowerRateConfig(multiplier=2.0, layer_decay=0.5)}
    config = config_of(name="lion", learning_rate=0.1, weight_decay=0.5, schedule=constant, **rates)
    params = jax.tree.map(np.zeros_like, small_params())
    params["image"]["blocks"]["attention"]["out"]["kernel"][:] = 1.0
    gradients = jax.tree.map(lambda leaf: np.full_like(leaf, -1.0), params)
    got = named(run(config, params, [gradients])[0])
    np.testing.assert_allclose(got["image/stem/project/kernel"], 0.1 * 2 * 0.125)
    for layer, factor in enumerate((0.25, 0.5)):
        np.testing.assert_allclose(got["image/blocks/mlp/up/kernel"][layer], 0.1 * 2 * factor)
        decayed = 1 + 0.1 * 2 * factor * (1 - 0.5)  # decay learns at the same rate
        np.testing.assert_allclose(
            got["image/blocks/attention/out/kernel"][layer], decayed, rtol=1e-6
        )
    np.testing.assert_allclose(got["image_projection/kernel"], 0.2)
    np.testing.assert_allclose(got["text/token_embedding"], 0.1)


def test_the_learning_rate_is_that_of_the_step_given():
    config = config_of(name="sgd", b1=0.0, learning_rate=1.0, clip_global_norm=None)
    optimizer, schedule = make_optimizer(config), make_schedule(config)
    params = {"mlp": {"bias": jnp.zeros(1)}}
    state, ones = optimizer.init(params), jax.tree.map(jnp.ones_like, params)
    assert not jax.tree.leaves(state)
    for step in (5, 1, 1):
        updates, state = optimizer.update(ones, state, params, step=jnp.int32(step))
        np.testing.assert_allclose(updates["mlp"]["bias"], [-schedule(step)])


def kind_of(name):
    """What decides which parameters a model has."""
    model = model_of(name)
    image, text = model.image, model.text
    parts = (image.kind, image.stem, image.pooling, image.activation, text.kind, text.pooling)
    return (*parts, model.image_projection, model.text_projection, text.activation)


KINDS = {kind_of(name): name for name in [*FAMILIES.values(), *TOWERS]}
OTHERS = sorted({*FAMILIES.values(), *TOWERS} - {*KINDS.values()})


@pytest.mark.parametrize(
    "name", [*KINDS.values(), *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_state_of_every_model_and_rule_is_in_the_table(name):
    """Every array matches one rule and can be split by it; decayed are matrices and tokens."""
    model = shrunk(model_of(name))
    one_head = {  # as wide as adafactor needs to factor its matrices
        tower: dataclasses.replace(getattr(model, tower), num_heads=1)
        for tower in ("image", "text")
    }
    config = ExperimentConfig(model=dataclasses.replace(model, **one_head))
    params, _ = jax.eval_shape(ContrastiveTask(config, mesh_of()).init, jax.random.key(0))
    for path, decays in named(decay_mask(params)).items():
        assert decays == (path.endswith(("/kernel", "token_embedding"))), path
    mesh = mesh_of(2, 2, 2)
    for rule in RULES:
        changed = dataclasses.replace(config, optimizer=OptimizerConfig(name=rule))
        state = jax.eval_shape(make_optimizer(changed).init, params)
        for path in named(state):
            assert len(matching_rules(path)) == 1, path
        state_shardings(state, mesh)


@pytest.mark.parametrize("rule", RULES)
def test_large_states_are_split(rule):
    """Of ViT-L's text and image towers no array over 1 MB is whole on 8 devices."""
    model = dataclasses.replace(
        small_model(),
        image=dataclasses.replace(small_model().image, width=1024, num_heads=16, depth=4),
        text=dataclasses.replace(small_model().text, width=768, num_heads=12, depth=4),
    )
    config = small_config(model=model, optimizer=OptimizerConfig(name=rule))
    params, _ = jax.eval_shape(ContrastiveTask(config, mesh_of()).init, jax.random.key(0))
    state = jax.eval_shape(make_optimizer(config).init, params)
    shardings = named(state_shardings(state, mesh_of(fsdp=4, tensor=2)))
    for path, sharding in shardings.items():
        if path.endswith(("qkv/kernel/column", "out/kernel/column")):
            assert {"fsdp", "tensor"} < set(sharding.spec), path
    large = {path: leaf for path, leaf in named(state).items() if leaf.size * 4 > 1 << 20}
    assert large
    for path, leaf in large.items():
        assert np.prod(shardings[path].shard_shape(leaf.shape)) * 4 <= leaf.size, path


def test_other_patterns_of_what_does_not_decay():
    mask = named(decay_mask(small_params(), ("projection/kernel", "bias")))
    assert mask["image/class_embedding"]
    assert not mask["image_projection/kernel"]
    assert not mask["image/blocks/mlp/up/bias"]
    assert mask["image/stem/project/kernel"]
