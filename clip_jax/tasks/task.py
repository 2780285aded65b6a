"""What the training loop knows of a run's purpose: the seam for further objectives."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax

Array = jax.Array
Tree = dict[str, Any]  # nested dicts of arrays, by name


class Task(Protocol):
    """A model, its loss on a batch, and what checkpoints, plans and benchmarks ask of them.

    All methods are pure. `model_state` is what the optimizer does not train (batch-norm
    statistics, later momentum towers and queues); {} where there is none.
    """

    def init(self, rng: Array) -> tuple[Tree, Tree]:
        """Fresh (params, model_state) from a key."""
        ...

    def loss(
        self,
        params: Tree,
        model_state: Tree,
        batch: Mapping[str, Array],
        *,
        rng: Array,
        step: Array,
    ) -> tuple[Array, tuple[Tree, dict[str, Array]]]:
        """(loss, (model_state, metrics)): scalars over the global batch."""
        ...

    def constrain(self, params: Tree) -> Tree:
        """Parameters put back into their range after an update."""
        ...

    def trainable(self, path: str) -> bool:
        """Whether the optimizer updates the parameter at `path` ('image/blocks/mlp/up/kernel')."""
        ...

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, global shapes and dtypes of a batch."""
        ...

    def embed(
        self, params: Tree, model_state: Tree, batch: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Unit-length embeddings [B, E] of what `batch` holds: 'image', 'text' or both."""
        ...

    def flops(self, *, least: bool = False) -> int:
        """Analytic FLOPs of one training sample, forward and backward.

        As MFU counts them; least: without what the model can do without.
        """
        ...
