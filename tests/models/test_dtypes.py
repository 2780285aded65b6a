"""Products of the towers are in bfloat16 where the config says so: in the program as traced."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr
from small import small_model

from clip_jax.config import ImageTowerConfig
from clip_jax.models import CLIP, Execution

BATCH, EMBED_DIM = 4, 24  # no other array has a dim of the second
MODEL = small_model()
VIT, TEXT = MODEL.image, MODEL.text
CONV = {"stem": "conv", "stem_widths": (8, 16), "stem_strides": (2, 2)}
RESNET = ImageTowerConfig(
    kind="resnet", image_size=64, width=8, num_heads=4, resnet_layers=(1, 1, 1, 1)
)
NAFLEX = dataclasses.replace(
    VIT, kind="naflex", class_token=False, pooling="mean", max_num_patches=6
)
SIGLIP = dataclasses.replace(TEXT, causal=False, pooling="attention")
BERT = dataclasses.replace(TEXT, kind="bert", pooling="mean")
# In einsum's letters, by which JAX names what it calls:
POSITIONS = "bts,sd->btd"


def equations(jaxpr):
    """All of them, those of what it calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: isinstance(leaf, Jaxpr)
        ):
            if isinstance(inner, ClosedJaxpr):
                inner = inner.jaxpr
            if isinstance(inner, Jaxpr):
                yield from equations(inner)


def float32_products(encode, model, inputs, backend):
    """The kinds of products, of the embeddings and of their gradients, with a float32 operand."""
    execution = Execution.for_backend(backend, precision="bfloat16")
    abstract = nnx.eval_shape(lambda: CLIP(model, execution, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)

    def total(state, inputs):
        return encode(nnx.merge(graph, state), inputs).sum()

    jaxpr = jax.make_jaxpr(jax.grad(total))(state, inputs)
    found = [
        equation
        for equation in equations(jaxpr.jaxpr)
        if equation.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    kinds = [kind_of(equation) for equation in found]
    assert kinds.count("bfloat16") >= 12  # four of a block, each forward and two for gradients
    return set(kinds) - {"bfloat16"}


def kind_of(equation):
    operands = [operand.aval for operand in equation.invars]
    dtypes = [operand.dtype for operand in operands]
    name = str(equation.source_info.name_stack)
    if dtypes == [jnp.bfloat16] * 2:
        return "bfloat16"
    if POSITIONS in name:
        return "positions"
    if any(EMBED_DIM in operand.shape for operand in operands):
        return "projection"
    return f"{name} {operands}"


def image_inputs(image):
    if image.kind != "naflex":
        size = image.image_size
        return {"image": jax.ShapeDtypeStruct((BATCH, size, size, 3), jnp.uint8)}
    num, values = image.max_num_patches, 3 * image.patch_size**2
    return {
        "patches": jax.ShapeDtypeStruct((BATCH, num, values), jnp.uint8),
        "patch_mask": jax.ShapeDtypeStruct((BATCH, num), jnp.bool_),
        "spatial_shapes": jax.ShapeDtypeStruct((BATCH, 2), jnp.int32),
    }


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize(
    "image",
    [VIT, dataclasses.replace(VIT, pooling="attention", activation="swiglu", **CONV), NAFLEX],
)
def test_images_are_multiplied_in_bfloat16(image, backend):
    model = small_model(image=image, embed_dim=EMBED_DIM)
    found = float32_products(CLIP.encode_image, model, image_inputs(image), backend)
    assert found == {"projection"}


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_resnets_convolve_in_bfloat16(backend):
    """The last product of their pooling is the projection."""
    model = small_model(image=RESNET, embed_dim=EMBED_DIM, image_projection="none")
    found = float32_products(CLIP.encode_image, model, image_inputs(RESNET), backend)
    assert found == {"projection"}


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize("text", [TEXT, SIGLIP, BERT], ids=["clip", "siglip", "bert"])
def test_captions_are_multiplied_in_bfloat16(text, backend):
    model = small_model(text=text, embed_dim=EMBED_DIM)
    tokens = jax.ShapeDtypeStruct((BATCH, text.context_length), jnp.int32)
    found = float32_products(CLIP.encode_text, model, {"tokens": tokens}, backend)
    assert found == {"projection"}


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_packed_captions_are_multiplied_in_bfloat16(backend):
    """But for their positions as well."""
    model = small_model(embed_dim=EMBED_DIM)
    tokens = jax.ShapeDtypeStruct((BATCH // 2, 1, TEXT.context_length), jnp.int32)
    eot = jax.ShapeDtypeStruct((BATCH // 2, 2), jnp.int32)
    inputs = {"tokens": tokens, "segments": tokens, "eot": eot}
    found = float32_products(CLIP.encode_text, model, inputs, backend)
    assert found == {"projection", "positions"}
