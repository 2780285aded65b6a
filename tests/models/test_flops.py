"""Counts against XLA's own of the compiled towers: it adds what is no matrix product."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from small import small_model

from clip_jax.config import ImageTowerConfig, TextTowerConfig
from clip_jax.models import CLIP, Execution, forward_flops

BATCH = 8
# Wide, so that matrix products dominate.
VIT = ImageTowerConfig(image_size=32, patch_size=8, width=128, depth=2, num_heads=2)
NAFLEX = dataclasses.replace(VIT, kind="naflex", class_token=False, max_num_patches=24)
RESNET = ImageTowerConfig(
    kind="resnet", image_size=128, width=32, num_heads=4, resnet_layers=(1, 2, 1, 1)
)
TEXT = TextTowerConfig(vocab_size=64, eot_id=63, context_length=16, width=128, depth=2, num_heads=2)
BERT = dataclasses.replace(TEXT, kind="bert", pooling="class_token", pooler=True)


def counted(method, model, inputs):
    """XLA's count, of layers unrolled: it counts the body of a scan once."""
    abstract = jax.eval_shape(
        lambda key: CLIP(model, Execution(unroll_layers=True), rngs=nnx.Rngs(key)),
        jax.random.key(0),
    )
    compiled = jax.jit(method).lower(abstract, inputs).compile()
    return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (VIT, {}),
        (VIT, {"pooling": "mean", "class_token": False, "activation": "swiglu"}),
        (VIT, {"pooling": "attention", "num_registers": 4}),
        (VIT, {"stem": "conv", "stem_widths": (8, 16), "stem_strides": (2, 2)}),
        (NAFLEX, {"pooling": "attention"}),
        (NAFLEX, {"pooling": "mean", "num_registers": 4}),
        (RESNET, {}),
    ],
)
@pytest.mark.parametrize("projection", ["mlp"])
def test_image_flops_are_what_xla_counts(config, changes, projection):
    config = dataclasses.replace(config, **changes)
    model = small_model(image=config, embed_dim=256, image_projection=projection)
    size = config.image_size
    inputs = {"image": jax.ShapeDtypeStruct((BATCH, size, size, 3), jnp.float32)}
    if config.kind == "naflex":
        num, values = config.max_num_patches, 3 * config.patch_size**2
        inputs = {
            "patches": jax.ShapeDtypeStruct((BATCH, num, values), jnp.float32),
            "patch_mask": jax.ShapeDtypeStruct((BATCH, num), jnp.bool_),
            "spatial_shapes": jax.ShapeDtypeStruct((BATCH, 2), jnp.int32),
        }
    ratio = counted(CLIP.encode_image, model, inputs) / (
        BATCH * forward_flops(model, least=True)[0]
    )
    assert 0.95 < ratio < 1.12


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (TEXT, {}),
        (TEXT, {"pooling": "attention", "causal": False}),
        (BERT, {}),
        (BERT, {"pooling": "mean", "pooler": False}),
    ],
)
def test_text_flops_are_what_xla_counts(config, changes):
    model = small_model(text=dataclasses.replace(config, **changes), embed_dim=256)
    inputs = {"tokens": jax.ShapeDtypeStruct((BATCH, config.context_length), jnp.int32)}
    ratio = counted(CLIP.encode_text, model, inputs) / (BATCH * forward_flops(model, least=True)[1])
    assert 0.95 < ratio < 1.12


def test_flops_of_packed_text_are_what_xla_counts():
    model = small_model(text=TEXT, embed_dim=256)
    tokens = jax.ShapeDtypeStruct((2, 3, TEXT.context_length), jnp.int32)
    inputs = {"tokens": tokens, "segments": tokens, "eot": jax.ShapeDtypeStruct((2, 4), jnp.int32)}
    analytic = BATCH * forward_flops(model, rows_per_text=3 / 4, least=True)[1]
    assert 0.95 < counted(CLIP.encode_text, model, inputs) / analytic < 1.12


@pytest.mark.parametrize(
    ("projection", "expected"),
    [("none", 0), ("linear", 2 * 32 * 16), ("linear_bias", 2 * 32 * 16), ("mlp", 2 * 24 * 48)],
)
def test_a_bag_of_words_is_its_projection(projection, expected):
    text = TextTowerConfig(kind="cbow", pooling="mean", width=32)
    model = small_model(text=text, text_projection=projection)
    assert forward_flops(model)[1] == expected
