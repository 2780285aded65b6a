"""Contrastive pretraining of two towers: the exact softmax loss over the global batch.

Shape suffixes: B global batch, E embedding width, k microbatches.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax.config import ExperimentConfig
from clip_jax.models import CLIP, Execution, forward_flops
from clip_jax.objectives import softmax_contrastive_loss
from clip_jax.parallel import BATCH_AXES
from clip_jax.tasks.task import Tree

Array = jax.Array


class ContrastiveTask:
    """CLIP as a `Task`. `execution` defaults to what suits the backend in use."""

    def __init__(
        self, config: ExperimentConfig, mesh: Mesh, *, execution: Execution | None = None
    ) -> None:
        self.config, self.mesh = config, mesh
        self.execution = execution or Execution.for_backend(
            jax.default_backend(), precision=config.precision, remat=config.remat
        )
        self._graphdef, self._abstract = nnx.split(
            jax.eval_shape(self._new_model, jax.random.key(0))
        )

    def _new_model(self, rng: Array) -> CLIP:
        return CLIP(self.config.model, self.execution, rngs=nnx.Rngs(rng))

    def model(self, params: Tree) -> CLIP:
        """The nnx module that holds `params`; cheap inside jit, where it is traced away."""
        state: Any = jax.tree.map(lambda leaf: leaf, self._abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graphdef, state)

    def init(self, rng: Array) -> tuple[Tree, Tree]:
        return nnx.to_pure_dict(nnx.state(self._new_model(rng))), {}

    def loss(
        self,
        params: Tree,
        model_state: Tree,
        batch: Mapping[str, Array],
        *,
        rng: Array,
        step: Array,
    ) -> tuple[Array, tuple[Tree, dict[str, Array]]]:
        del rng, step  # the towers draw no random numbers
        model = self.model(params)
        image_BE, text_BE = self._encode(model, batch)
        logit_scale = model.logit_scale()
        rows = PartitionSpec(BATCH_AXES)
        sharded_loss = jax.shard_map(
            lambda image_bE, text_bE, scale: softmax_contrastive_loss(
                image_bE, text_bE, scale, axis_names=BATCH_AXES
            ),
            mesh=self.mesh,
            in_specs=(rows, rows, PartitionSpec()),
            out_specs=PartitionSpec(),
        )
        loss, metrics = sharded_loss(image_BE, text_BE, logit_scale)
        return loss, (model_state, metrics | {"logit_scale": logit_scale})

    def _encode(self, model: CLIP, batch: Mapping[str, Array]) -> tuple[Array, Array]:
        """Both towers' embeddings [B, E], in microbatches that are recomputed going backward."""

        def encode(rows: Mapping[str, Array]) -> tuple[Array, Array]:
            return model.encode_image(rows), model.encode_text(rows)

        k = self.config.microbatches
        if k == 1:
            return encode(batch)
        # GradCache (Gao et al. 2021): only embeddings are kept, and autodiff runs each microbatch
        # again. Rows are dealt (B/k, k), so every device keeps the rows it has.
        by_microbatch = NamedSharding(self.mesh, PartitionSpec(None, BATCH_AXES))

        def deal(x_B: Array) -> Array:
            x_kb = jnp.moveaxis(x_B.reshape(x_B.shape[0] // k, k, *x_B.shape[1:]), 1, 0)
            return jax.lax.with_sharding_constraint(x_kb, by_microbatch)

        def collect(x_kbE: Array) -> Array:
            return jnp.moveaxis(x_kbE, 0, 1).reshape(-1, x_kbE.shape[-1])

        image_kbE, text_kbE = jax.lax.map(jax.checkpoint(encode), jax.tree.map(deal, dict(batch)))
        return collect(image_kbE), collect(text_kbE)

    def constrain(self, params: Tree) -> Tree:
        """Clips the logit scale from above, as CLIP does to keep training stable."""
        highest = jnp.log(self.config.model.logit_scale_max)
        return params | {"log_logit_scale": jnp.minimum(params["log_logit_scale"], highest)}

    def trainable(self, path: str) -> bool:
        return True

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        model, batch = self.config.model, self.config.global_batch_size
        size = model.image.image_size
        return {
            "image": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8),
            "tokens": jax.ShapeDtypeStruct((batch, model.text.context_length), jnp.int32),
        }

    def embed(
        self, params: Tree, model_state: Tree, batch: Mapping[str, Array]
    ) -> dict[str, Array]:
        model = self.model(params)
        embeddings = {}
        if "image" in batch:
            embeddings["image"] = model.encode_image(batch)
        if "tokens" in batch:
            embeddings["text"] = model.encode_text(batch)
        return embeddings

    def flops(self) -> int:
        """Three forward passes per sample: one forward, two backward. The loss is left out."""
        return 3 * sum(forward_flops(self.config.model))
