"""Vision towers of transformers with random weights, and those weights in our layout."""

import dataclasses
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from peers import define_missing_operators


@dataclasses.dataclass(frozen=True)
class Names:
    """What a family calls the parts of a block and of what surrounds the blocks."""

    block: str
    attention: str
    out: str
    norms: tuple[str, str]
    patch: str
    position: str
    final_norm: str


SIGLIP = Names(
    block="encoder.layers",
    attention="self_attn",
    out="out_proj",
    norms=("layer_norm1", "layer_norm2"),
    patch="embeddings.patch_embedding",
    position="embeddings.position_embedding.weight",
    final_norm="post_layernorm",
)
VIT = Names(
    block="layers",
    attention="attention",
    out="o_proj",
    norms=("layernorm_before", "layernorm_after"),
    patch="embeddings.patch_embeddings.projection",
    position="embeddings.position_embeddings",
    final_norm="layernorm",
)


def transformers_or_skip() -> ModuleType:
    """Its vision models import torchvision wherever there is one, which may not load by itself."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    if importlib.util.find_spec("torchvision"):
        define_missing_operators(torch)
    return pytest.importorskip("transformers")


def perturbed(peer: Any) -> Any:
    """All parameters moved: the peers start biases at 0, norms at 1, and class tokens at 0."""
    import torch

    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return peer.eval()


def from_peer(values: dict[str, np.ndarray], names: Names, heads: int) -> dict[str, Any]:
    """Arrays by the peer's names (weights or gradients) as the parameters of our tower."""
    used = set()

    def take(name):
        used.add(name)
        return values[name]

    def linear(name):
        return {"kernel": take(name + ".weight").T, "bias": take(name + ".bias")}

    def norm(name):
        return {"scale": take(name + ".weight"), "bias": take(name + ".bias")}

    def out(name):
        params = linear(name)
        return {"kernel": params["kernel"].reshape(heads, -1, width), "bias": params["bias"]}

    def block(prefix):
        qkv = [linear(f"{prefix}.{names.attention}.{c}_proj") for c in "qkv"]
        kernel = np.stack([part["kernel"] for part in qkv], 1)
        bias = np.stack([part["bias"] for part in qkv])
        return {
            "attention_norm": norm(f"{prefix}.{names.norms[0]}"),
            "attention": {
                "qkv": {
                    "kernel": kernel.reshape(width, 3, heads, -1),
                    "bias": bias.reshape(3, heads, -1),
                },
                "out": out(f"{prefix}.{names.attention}.{names.out}"),
            },
            "mlp_norm": norm(f"{prefix}.{names.norms[1]}"),
            "mlp": {"up": linear(f"{prefix}.mlp.fc1"), "down": linear(f"{prefix}.mlp.fc2")},
        }

    def pooling():
        kernel, bias = take("head.attention.in_proj_weight"), take("head.attention.in_proj_bias")
        q, k, v = kernel.reshape(3, width, width).transpose(0, 2, 1)
        return {
            "probe": take("head.probe")[0],
            "query": {
                "kernel": q.reshape(width, heads, -1),
                "bias": bias[:width].reshape(heads, -1),
            },
            "key_value": {
                "kernel": np.stack([k, v], 1).reshape(width, 2, heads, -1),
                "bias": bias[width:].reshape(2, heads, -1),
            },
            "out": out("head.attention.out_proj"),
            "norm": norm("head.layernorm"),
            "mlp": {"up": linear("head.mlp.fc1"), "down": linear("head.mlp.fc2")},
        }

    patch = take(names.patch + ".weight")  # [D, 3, rows, columns], or [D, P] already
    width = patch.shape[0]
    kernel = patch.transpose(2, 3, 1, 0).reshape(-1, width) if patch.ndim == 4 else patch.T
    depth = 1 + max(
        int(name.split(".")[names.block.count(".") + 1])
        for name in values
        if name.startswith(names.block + ".")
    )
    layers = [block(f"{names.block}.{i}") for i in range(depth)]
    params = {
        "stem": {"project": {"kernel": kernel, "bias": take(names.patch + ".bias")}},
        "position_embedding": take(names.position).reshape(-1, width),
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *layers),
        "final_norm": norm(names.final_norm),
    }
    if "embeddings.cls_token" in values:
        params["class_embedding"] = take("embeddings.cls_token").reshape(width)
    if "head.probe" in values:
        params["pooling"] = pooling()
    assert used == set(values), set(values) - used
    return jax.tree.map(jnp.asarray, params)


def with_params(make: Callable[[], nnx.Module], params: dict[str, Any]) -> Any:
    """The module that `make` makes, with these parameters: all of them, and no others."""
    graph, state = nnx.split(jax.eval_shape(make))
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    assert shapes == jax.tree.map(jnp.shape, params)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)
