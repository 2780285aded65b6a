"""Twenty steps of training here, on eight devices, and in open_clip, from the same weights."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop import open_clip_models as peer
from peers import open_clip_or_skip
from small import mesh_of, small_config

from clip_jax.checkpoint import unflatten
from clip_jax.config import OptimizerConfig, ScheduleConfig
from clip_jax.interop import open_clip as open_clip_format
from clip_jax.interop.open_clip_tables import rows
from clip_jax.interop.weights import flatten
from clip_jax.parallel import to_global_batch
from clip_jax.tasks import ContrastiveTask
from clip_jax.training.optimizer import decay_mask, make_optimizer, make_schedule
from clip_jax.training.state import abstract_state, init_state
from clip_jax.training.step import make_train_step

NUM_STEPS, BATCH_SIZE = 20, 32
# ViT-B-32, smaller in every direction; the vocabulary is not CLIP's, so no tokenizer comes along.
MODEL_CFG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {
        "context_length": 12,
        "vocab_size": 128,
        "width": 48,
        "heads": 3,
        "layers": 3,
        "hf_tokenizer_name": peer.NO_TOKENIZER,
    },
}


def make_config(model):
    return dataclasses.replace(
        small_config(),
        model=model,
        num_steps=NUM_STEPS,
        global_batch_size=BATCH_SIZE,
        mesh=(4, 2, 1),
        optimizer=OptimizerConfig(learning_rate=1e-3, clip_global_norm=1.0),
        schedule=ScheduleConfig(warmup_steps=4, end_fraction=0.1),
    )


def batches():
    """Five batches, four times over, so that the loss falls."""
    for step in range(NUM_STEPS):
        inputs = peer.random_inputs(MODEL_CFG, num=BATCH_SIZE, seed=step % 5)
        size = MODEL_CFG["vision_cfg"]["image_size"]
        rng = np.random.default_rng(step % 5)
        image = rng.integers(0, 256, (BATCH_SIZE, size, size, 3), dtype=np.uint8)
        yield {"image": image, "tokens": inputs["tokens"]}


def inputs_there(batch, model):
    """open_clip normalises images before the model."""
    mean_C, std_C = (np.asarray(x, np.float32) for x in (model.image.mean, model.image.std))
    return batch | {"image": (batch["image"].astype(np.float32) / 255 - mean_C) / std_C}


def train_here(weights, config):
    """Losses and gradient norms of each step, and the embeddings of the first batch after it."""
    mesh = mesh_of(*config.mesh)
    task, optimizer = ContrastiveTask(config, mesh), make_optimizer(config)
    abstract = abstract_state(task, optimizer, mesh)
    state = init_state(task, optimizer, abstract, seed=0)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
    params = jax.device_put(unflatten(weights.arrays), shardings)
    state = state._replace(params=params)
    step = make_train_step(task, optimizer, make_schedule(config), abstract, mesh, seed=0)
    losses, norms = [], []
    for batch in batches():
        state, metrics = step(state, to_global_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["gradient_norm"]))
    embed = jax.jit(lambda params, batch: task.embed(params, {}, batch))
    return losses, norms, jax.device_get(embed(state.params, next(batches())))


def train_there(open_clip, model, config, decays, learning_rates):
    """The same in open_clip: its model and loss, torch's AdamW."""
    settings = config.optimizer
    names = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in names.items() if decays[name]]},
        {"params": [p for name, p in names.items() if not decays[name]], "weight_decay": 0.0},
    ]
    optimizer = peer.torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=(settings.b1, settings.b2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    model.train()
    loss_of, losses, norms = open_clip.loss.ClipLoss(), [], []
    for learning_rate, batch in zip(learning_rates, batches(), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss = loss_of(*peer.forward(model, inputs_there(batch, config.model)))
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in names.values()))
        for p in names.values():  # as optax: by the norm itself, where it is too large
            p.grad.mul_(min(1.0, settings.clip_global_norm / norm))
        optimizer.step()
        with peer.torch.no_grad():
            model.logit_scale.clamp_(max=math.log(config.model.logit_scale_max))
        losses.append(loss.item())
        norms.append(norm)
    first = inputs_there(next(batches()), config.model)
    return losses, norms, peer.embeddings(model.eval(), first)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return both_runs(open_clip_or_skip(), tmp_path_factory.mktemp("start"))


def both_runs(open_clip, folder):
    """What `train_here` and `train_there` give from the same start, and the config."""
    model = peer.build(open_clip, MODEL_CFG)
    directory = peer.save(model, MODEL_CFG, folder)
    weights = open_clip_format.read(directory)
    config = make_config(weights.model)
    # One mask for both: ours, carried over by the table of names. open_clip's own differs in the
    # position embeddings, which it decays.
    mask = flatten(decay_mask(unflatten(weights.arrays)))
    table = rows(weights.model, custom_text=False, vector_scalars=False)
    decays = {
        name: mask[row.ours]
        for row in table
        for layer in range(len(weights.arrays[row.ours]) if row.stacked else 1)
        for name in row.names(layer)
    }
    schedule = make_schedule(config)
    learning_rates = [float(schedule(jnp.int32(step))) for step in range(NUM_STEPS)]
    here = train_here(weights, config)
    return here, train_there(open_clip, model, config, decays, learning_rates), config


def test_losses_agree_at_every_step(runs):
    (losses, norms, _), (peer_losses, peer_norms, _), config = runs
    np.testing.assert_allclose(losses, peer_losses, rtol=1e-4)
    np.testing.assert_allclose(norms, peer_norms, rtol=1e-3)
    # The run is one in which there is something to agree on.
    assert losses[-1] < losses[0] - 1
    limit = config.optimizer.clip_global_norm
    assert max(norms) > limit > min(norms)


def test_embeddings_agree_after_the_last_step(runs):
    (_, _, embeddings), (_, _, peer_embeddings), _ = runs
    for part in ("image", "text"):
        np.testing.assert_allclose(embeddings[part], peer_embeddings[part], rtol=0, atol=1e-3)
