"""How towers compute: dtype, what is kept for the backward pass, kernels, where arrays lie."""

import dataclasses
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from clip_jax.config import ConfigError

Array = jax.Array


def _all_but_gathered_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: what `Layout.whole` makes is gathered again going backward."""
    # It is a custom_vjp whose body pins shardings; cuDNN's attention is another, to be kept.
    gathers = primitive.name.startswith("custom_vjp_call") and "sharding_constraint" in str(
        params.get("call_jaxpr")
    )
    return not gathers and bool(primitive.name != "sharding_constraint")


REMAT_POLICIES: dict[str, Any] = {
    "none": _all_but_gathered_weights,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


class Layout(Protocol):
    """Where arrays lie while a tower computes; `clip_jax.parallel.Layout` is one."""

    @property
    def gathers(self) -> bool:
        """Whether weights are split, and gathered by `whole` for each use."""
        ...

    def rows(self, x_B: Array) -> Array: ...

    def all_rows(self, x_B: Array) -> Array: ...

    def look_up(self, table_VD: Array, tokens_B: Array) -> Array: ...

    def whole(self, tree: Any, *, dtype: Any = None) -> Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How the towers compute: nothing here changes what they compute, beyond rounding."""

    dtype: Any = jnp.float32
    remat: Literal["none", "dots", "full", "offload"] = "none"
    unroll_layers: bool = False  # GPUs copy the carry of a scan; CPUs and TPUs run scans faster
    attention: Literal["xla", "cudnn"] = "xla"
    # XLA's CPU backend lays convolutions out for its fast kernels outside of loops alone: inside,
    # the forward and backward pass of a stem takes 20 times as long (jax 0.10.2).
    convolve_in_loops: bool = True
    # It also turns the tokens' arrays and the weights around, in memory, where a product has more
    # axes than two. Split weights are better left as they are.
    flat_products: bool = False
    frozen_layers: int = 0  # so many blocks, and what comes before them, get no gradients
    layout: Layout | None = None  # None: on one device, or as XLA's partitioner sees fit

    @classmethod
    def for_backend(
        cls,
        backend: str,
        *,
        precision: str = "float32",
        remat: str = "none",
        layers: str = "auto",
        layout: Layout | None = None,
        device: Any = None,
    ) -> "Execution":
        """What to use on `backend` ('cpu', 'gpu', 'tpu'). Raises ConfigError on unknown names.

        device: one of JAX's, whose kernels are asked for; None: of a GPU, those of Ampere or later.
        """
        if remat not in REMAT_POLICIES:
            raise ConfigError(
                f"unknown remat policy {remat!r}; there are {', '.join(REMAT_POLICIES)}"
            )
        if layers not in ("auto", "scan", "unroll"):
            raise ConfigError(f"config.layers is {layers!r}; there are auto, scan, unroll")
        on_gpu = backend in ("gpu", "cuda")
        fuses = on_gpu and precision == "bfloat16" and _has_cudnn_attention(device)
        # Unrolled, offloading frees little: four layers of ViT-B/32's towers, 2,048 pairs on an
        # H100, need 12.5 GB with 'dots' and 11.7 with 'offload'; scanned 7.2 with 'offload'.
        unrolls = on_gpu and remat != "offload"
        return cls(
            dtype=jnp.dtype(precision),
            remat=remat,  # type: ignore[arg-type]  # checked just above
            unroll_layers=layers == "unroll" or (layers == "auto" and unrolls),
            attention="cudnn" if fuses else "xla",
            convolve_in_loops=backend != "cpu",
            flat_products=backend == "cpu",
            layout=layout,
        )


def _has_cudnn_attention(device: Any) -> bool:
    """NVIDIA's GPUs have it since Ampere, 8.0. AMD's give an architecture there: 'gfx942'."""
    major = getattr(device, "compute_capability", "8.0").split(".")[0]
    return bool(major.isdigit() and int(major) >= 8)
