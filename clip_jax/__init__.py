"""Contrastive image-text pretraining in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_jax.interop.loading import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # JAX is imported when it is needed: `clip-jax --help` answers at once.
    if name == "load":
        from clip_jax.interop.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
