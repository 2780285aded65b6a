"""The ring on 1 to 8 devices against the dense float64 oracle, and the errors of the entry."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from objectives.oracle import (
    open_clip_losses,
    random_pairs,
    relative_error,
    textbook,
    unit_rows,
)

from clip_jax.objectives import (
    contrastive_loss,
    dense_sigmoid_contrastive_loss,
    dense_softmax_contrastive_loss,
    sigmoid_contrastive_loss,
    softmax_contrastive_loss,
)

BATCH, EMBED_DIM = 40, 16
AXES = ("data", "fsdp", "tensor")
DENSE = {"softmax": dense_softmax_contrastive_loss, "sigmoid": dense_sigmoid_contrastive_loss}
IDS = ("image_ids", "text_ids")
ALL = (*IDS, "weights")


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str
    mesh: tuple[int, ...]
    tile: int
    use: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    batch_axes: tuple[str, ...] | None = None  # None: all of the mesh
    replicated: tuple[str, ...] = ()
    check_vma: bool = True


def opt(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(options.items())


# Rows per device: 40, 20, 10 and 5; tiles that divide them, and not, and are one.
CASES = {
    "one-device": Case("softmax", (), 40),
    "one-device-tiles": Case("softmax", (1,), 16, ("weights",), opt(label_smoothing=0.1)),
    "two": Case("softmax", (2,), 7),
    "four-exclude": Case("softmax", (4,), 5, IDS),
    "eight-beta": Case("softmax", (8,), 2, ("text_ids",), opt(beta=0.5)),
    "4x2-positive": Case("softmax", (4, 2), 5, IDS, opt(duplicates="positive")),
    "2x2x2-all": Case(
        "softmax", (2, 2, 2), 3, ALL, opt(duplicates="positive", label_smoothing=0.1, beta=0.3)
    ),
    "tensor-shares-rows": Case(
        "softmax", (2, 2, 2), 5, ("weights",), (), ("data", "fsdp"), ("tensor",)
    ),
    "no-vma": Case(
        "softmax", (2, 2, 2), 5, ("weights",), (), ("data", "fsdp"), ("tensor",), check_vma=False
    ),
    "tensor-of-one": Case("softmax", (2, 2, 1), 5, ("weights",), (), ("data", "fsdp"), ("tensor",)),
    "one-axis-of-two": Case("softmax", (2, 4), 8, (), (), ("fsdp",)),
    "both-ways": Case("softmax", (8,), 5, (), opt(bidirectional=True)),
    "sigmoid-one-device": Case("sigmoid", (), 16, ("weights",)),
    "sigmoid-eight": Case("sigmoid", (8,), 2, IDS),
    "sigmoid-4x2-beta": Case("sigmoid", (4, 2), 5, (), opt(beta=0.2)),
    "sigmoid-2x2x2-all": Case("sigmoid", (2, 2, 2), 3, ALL, opt(duplicates="positive", beta=0.3)),
    "sigmoid-tensor": Case(
        "sigmoid", (2, 2, 2), 5, ("weights",), (), ("data", "fsdp"), ("tensor",)
    ),
}


def ring(case: Case) -> Any:
    """value_and_grad of the sharded loss: (image, text, scale, bias, labels) -> ..."""

    def local(image: Any, text: Any, scale: Any, bias: Any, labels: Any, **axes: Any) -> Any:
        return contrastive_loss(
            image, text, scale, bias, kind=case.kind, tile_size=case.tile,
            **labels, **dict(case.options), **axes,
        )  # fmt: skip

    gradient = functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3), has_aux=True)
    if not case.mesh:
        return jax.jit(gradient(local))
    names = AXES[: len(case.mesh)]
    batch_axes = case.batch_axes or names
    devices = jax.devices()[: int(np.prod(case.mesh))]
    mesh = jax.make_mesh(
        case.mesh, names, axis_types=(AxisType.Auto,) * len(names), devices=devices
    )
    rows, whole = PartitionSpec(batch_axes), PartitionSpec()
    sharded = jax.shard_map(
        functools.partial(local, axis_names=batch_axes, replicated_axis_names=case.replicated),
        mesh=mesh,
        in_specs=(rows, rows, whole, whole, rows),
        out_specs=whole,
        check_vma=case.check_vma,
    )
    return jax.jit(gradient(sharded))


def dense(case: Case, pairs: dict[str, np.ndarray], scale: float, bias: float, dtype: Any) -> Any:
    options = {k: v for k, v in case.options if k != "bidirectional"}
    with jax.enable_x64(dtype == np.float64):
        labels = as_arrays(case, pairs, dtype)
        return jax.value_and_grad(
            lambda *inputs: DENSE[case.kind](*inputs, **labels, **options),
            argnums=(0, 1, 2, 3),
            has_aux=True,
        )(*(jnp.asarray(x, dtype) for x in (pairs["image"], pairs["text"], scale, bias)))


def as_arrays(case: Case, pairs: dict[str, np.ndarray], dtype: Any) -> dict[str, jax.Array]:
    return {
        name: jnp.asarray(pairs[name], dtype if name == "weights" else np.int32)
        for name in case.use
    }


def gradient_errors(
    pairs: dict[str, np.ndarray], scale: float, gradients: Any, exact: Any
) -> list[float]:
    """Relative to the exact norms; the scale's to the norm of the rows that cancel in its sum."""
    errors = [relative_error(*both) for both in zip(gradients, exact, strict=True)]
    rows = np.sum(pairs["image"] * np.asarray(exact[0]), axis=1) / scale
    errors[2] *= abs(float(exact[2])) / max(abs(float(exact[2])), np.abs(rows).sum())
    return errors


@pytest.mark.parametrize("name", CASES)
def test_ring_equals_the_dense_float64_loss(name):
    case = CASES[name]
    loss_and_gradients = ring(case)
    for aligned, scale in ((False, 20.0), (False, 2.0**-7), (False, 100.0), (True, 100.0)):
        pairs = random_pairs(BATCH, EMBED_DIM, aligned=aligned)
        bias = -0.5 * scale
        inputs = (np.float32(x) for x in (pairs["image"], pairs["text"], scale, bias))
        (loss, metrics), gradients = loss_and_gradients(*inputs, as_arrays(case, pairs, np.float32))
        (exact, exact_metrics), exact_gradients = dense(case, pairs, scale, bias, np.float64)
        assert abs(float(loss) - float(exact)) <= 1e-6 * max(1, float(exact), scale)
        errors = gradient_errors(pairs, scale, gradients, exact_gradients)
        if max(errors) > 2e-6:
            assert aligned or scale > 20, (scale, errors)
            _, in_float32 = dense(case, pairs, scale, bias, np.float32)
            float32_errors = gradient_errors(pairs, scale, in_float32, exact_gradients)
            for error, float32_error in zip(errors, float32_errors, strict=True):
                assert error <= max(2e-6, 2 * float32_error), (scale, errors, float32_errors)
        for key, value in exact_metrics.items():
            size = max(1.0, abs(float(value)))
            assert abs(float(metrics[key]) - float(value)) <= 2e-6 * size, (key, scale)


def test_products_in_bfloat16_stay_near():
    case = dataclasses.replace(CASES["two"], options=opt(product_dtype=jnp.bfloat16))
    pairs = random_pairs(BATCH, EMBED_DIM)
    inputs = [np.float32(x) for x in (pairs["image"], pairs["text"], 10.0, 0.0)]
    (loss, _), gradients = ring(case)(*inputs, {})
    (exact, _), exact_gradients = dense(CASES["two"], pairs, 10.0, 0.0, np.float64)
    assert abs(float(loss) - float(exact)) < 1e-2  # 8 bits of mantissa at logits up to 10
    assert relative_error(gradients[0], exact_gradients[0]) < 1e-2
    assert relative_error(gradients[1], exact_gradients[1]) < 1e-2
    assert gradients[0].dtype == jnp.float32


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_equals_the_published_formula(kind):
    pairs = random_pairs(BATCH, EMBED_DIM)
    loss, gradients = textbook(pairs, 12.0, -4.0, kind=kind)
    inputs = [np.float32(x) for x in (pairs["image"], pairs["text"], 12.0, -4.0)]
    (got, _), got_gradients = ring(Case(kind, (8,), 5))(*inputs, {})
    assert abs(float(got) - loss) <= 1e-6 * max(loss, 12)
    assert max(gradient_errors(pairs, 12.0, got_gradients, gradients)) <= 2e-6


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_equals_open_clip_on_one_process(kind):
    peer = open_clip_losses()
    if peer is None:
        pytest.skip("open_clip_torch is not installed")
    import torch

    pairs = random_pairs(BATCH, EMBED_DIM)
    inputs = [torch.tensor(pairs[n], requires_grad=True) for n in ("image", "text")]
    inputs += [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (12.0, -4.0)]
    loss = peer.ClipLoss()(*inputs[:3]) if kind == "softmax" else peer.SigLipLoss()(*inputs)
    loss.backward()
    mine = [np.float32(x) for x in (pairs["image"], pairs["text"], 12.0, -4.0)]
    (got, _), gradients = ring(Case(kind, (8,), 5))(*mine, {})
    assert abs(float(got) - loss.item()) <= 1e-6 * max(loss.item(), 12)
    for gradient, theirs in zip(gradients, inputs, strict=True):
        if theirs.grad is not None:
            assert relative_error(gradient, theirs.grad.numpy()) <= 2e-6


def test_bfloat16_products_are_summed_in_float32_and_text_travels_in_bfloat16():
    # Read from the program: a CPU may keep more digits than it was asked for.
    case = dataclasses.replace(CASES["two"], options=opt(product_dtype=jnp.bfloat16))
    rows = jax.ShapeDtypeStruct((BATCH, EMBED_DIM), jnp.float32)
    program = str(jax.make_jaxpr(ring(case))(rows, rows, 10.0, 0.0, {}))
    assert set(re.findall(r":(\w+)\[\d+,\d+\]\S* = dot_general", program)) == {"f32"}
    assert set(re.findall(r"preferred_element_type=(\w+)", program)) == {"float32"}
    # Blocks of text in either pass, and the gradient of the block.
    blocks = re.findall(r":(\w+)\[\d+,16\]\S* = ppermute", program)
    assert sorted(set(blocks)) == ["bf16", "f32"]


def test_padding_changes_nothing():
    pairs = random_pairs(24, EMBED_DIM)
    image, text = np.float32(pairs["image"]), np.float32(pairs["text"])
    loss = jax.jit(softmax_contrastive_loss)
    whole, _ = loss(image[:20], text[:20], 10.0)
    weights = (np.arange(24) < 20).astype(np.float32)
    padded, metrics = loss(image, text, 10.0, weights=weights)
    assert float(padded) == pytest.approx(float(whole), rel=1e-6)
    assert all(np.isfinite(float(value)) for value in metrics.values())
    for of_padding in (loss, jax.jit(dense_softmax_contrastive_loss)):
        value, metrics = of_padding(image, text, 10.0, weights=np.zeros_like(weights))
        assert float(value) == 0
        assert all(np.isfinite(float(value)) for value in metrics.values())


def test_a_collapsed_model_has_nothing_right():
    accuracy = jax.jit(lambda x: softmax_contrastive_loss(x, x, 20.0)[1]["image_to_text_accuracy"])
    for seed in range(20):
        one = unit_rows(1, 512, seed=seed)
        assert float(accuracy(np.float32(np.repeat(one, 64, axis=0)))) == 0, seed


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_gradients_taken_inside_shard_map_are_the_same(kind):
    pairs = random_pairs(BATCH, EMBED_DIM)
    inputs = [np.float32(x) for x in (pairs["image"], pairs["text"], 12.0, -4.0)]
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows, whole = PartitionSpec(("data", "fsdp")), PartitionSpec()
    inside = jax.shard_map(
        jax.grad(
            lambda *x: contrastive_loss(*x, kind=kind, axis_names=("data", "fsdp"))[0],
            argnums=(0, 1, 2, 3),
        ),
        mesh=mesh,
        in_specs=(rows, rows, whole, whole),
        out_specs=(rows, rows, whole, whole),
    )
    _, expected = ring(Case(kind, (4, 2), 5))(*inputs, {})
    for got, gradient in zip(jax.jit(inside)(*inputs), expected, strict=True):
        np.testing.assert_allclose(got, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_nan_embeddings_reach_the_loss(kind):
    pairs = random_pairs(16, EMBED_DIM)
    image = np.float32(pairs["image"])
    image[3, 2] = np.nan
    loss, gradient = jax.jit(
        jax.value_and_grad(
            lambda x: contrastive_loss(x, np.float32(pairs["text"]), 10.0, kind=kind, tile_size=8)[
                0
            ]
        )
    )(image)
    assert np.isnan(float(loss))
    assert np.isnan(np.asarray(gradient)).any()


def test_softmax_is_blind_to_the_bias():
    pairs = random_pairs(16, EMBED_DIM)
    image, text = np.float32(pairs["image"]), np.float32(pairs["text"])
    loss = jax.jit(lambda bias: contrastive_loss(image, text, 10.0, bias, kind="softmax")[0])
    gradient = jax.jit(jax.grad(loss))(3.0)
    assert float(loss(3.0)) == float(loss(0.0))
    assert float(gradient) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_embeddings": np.ones((7, 4), np.float32)}, r"one shape .*\(8, 4\) and \(7, 4\)"),
        ({"image_ids": np.ones(7, np.int32)}, r"image_ids must have shape \(8,\).*\(7,\)"),
        ({"text_ids": np.ones(8, np.float32)}, "text_ids must be int32 hashes, got float32"),
        ({"weights": np.ones((8, 1))}, r"weights must have shape \(8,\)"),
        ({"kind": "hinge"}, "'hinge' is not 'softmax' or 'sigmoid'"),
        ({"kind": "sigmoid", "label_smoothing": 0.1}, "no meaning for kind 'sigmoid'"),
        ({"label_smoothing": 1.0}, r"outside \[0, 1\)"),
        ({"beta": -1.0}, "beta -1.0 must be 0"),
        ({"duplicates": "drop"}, "'drop' is not 'exclude' or 'positive'"),
        ({"tile_size": 0}, "tile_size 0 must be positive"),
        ({"beta": np.inf}, "beta inf must be .* finite"),
        ({"logit_scale": np.ones(8)}, r"logit_scale must be a scalar, got shape \(8,\)"),
        ({"kind": "sigmoid", "logit_bias": np.ones(1)}, r"logit_bias must be a scalar.*\(1,\)"),
        ({"product_dtype": jnp.int8}, "product_dtype int8 is not float32 or bfloat16"),
        ({"duplicates": "positive"}, "'positive' needs image_ids or text_ids"),
    ],
)
def test_bad_input_is_told_at_trace_time(changes, message):
    arguments: dict[str, Any] = {
        "image_embeddings": np.ones((8, 4), np.float32),
        "text_embeddings": np.ones((8, 4), np.float32),
        "logit_scale": 1.0,
        "kind": "softmax",
    }
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: contrastive_loss(**(arguments | changes)))


def test_rows_that_the_ranks_cannot_share_are_told():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows = PartitionSpec("data")
    sharded = jax.shard_map(
        lambda x: sigmoid_contrastive_loss(
            x, x, 1.0, 0.0, axis_names="data", replicated_axis_names="tensor"
        )[0],
        mesh=mesh,
        in_specs=rows,
        out_specs=PartitionSpec(),
    )
    with pytest.raises(ValueError, match="5 pairs per device are not divisible by the 4 ranks"):
        jax.eval_shape(sharded, jax.ShapeDtypeStruct((10, 4), jnp.float32))
