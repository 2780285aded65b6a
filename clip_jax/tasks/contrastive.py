"""Contrastive pretraining of two towers: the exact loss over the global batch.

Shape suffixes: B global batch, b rows of one device, L tokens, E embedding width, k microbatches;
of packed captions P groups of the batch, G samples of a group, R rows of a group.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax.config import ConfigError, ExperimentConfig, ImageTowerConfig
from clip_jax.config.frozen import is_frozen
from clip_jax.config.schema import PackingConfig
from clip_jax.models import CLIP, Execution, forward_flops
from clip_jax.objectives import contrastive_loss
from clip_jax.parallel import BATCH_AXES, Layout
from clip_jax.tasks.task import Tree

Array = jax.Array

_MOST_UNROLLED = 16  # microbatches; each adds an image tower to what is compiled


class ContrastiveTask:
    """CLIP as a `Task`. `execution` defaults to what suits the backend in use."""

    def __init__(
        self, config: ExperimentConfig, mesh: Mesh, *, execution: Execution | None = None
    ) -> None:
        self.config, self.mesh = config, mesh
        self.execution = execution or Execution.for_backend(
            jax.default_backend(),
            precision=config.precision,
            remat=config.remat,
            layers=config.layers,
            device=jax.local_devices()[0],
        )
        self.layout = Layout(mesh)
        if mesh.size > 1 and self.execution.layout is None:
            self.execution = dataclasses.replace(self.execution, layout=self.layout)
        abstract = jax.eval_shape(self._new_model, jax.random.key(0))
        self._graphdef, *self._states = nnx.split(abstract, nnx.Param, nnx.BatchStat)
        image = config.model.image
        # A locked tower runs as in evaluation: all patches, and batch statistics as they are.
        paths = jax.tree_util.tree_leaves_with_path(_arrays(abstract, nnx.Param))
        trained = {_name(path).split("/")[0] for path, _ in paths if self.trainable(_name(path))}
        self._image_trains, self._text_trains = "image" in trained, "text" in trained
        self._image_needs_keys = self._image_trains and (
            image.patch_dropout > 0 or image.kind == "resnet"
        )

    def _new_model(self, rng: Array) -> CLIP:
        image, text = (
            dataclasses.replace(self.execution, frozen_layers=tower.frozen_layers)
            for tower in (self.config.optimizer.image, self.config.optimizer.text)
        )
        return CLIP(self.config.model, image, text_execution=text, rngs=nnx.Rngs(rng))

    def model(self, params: Tree, model_state: Tree) -> CLIP:
        """The nnx module that holds these arrays; cheap inside jit, where it is traced away."""
        states = []
        for abstract, arrays in zip(self._states, (params, model_state), strict=True):
            state: Any = jax.tree.map(lambda leaf: leaf, abstract)
            nnx.replace_by_pure_dict(state, arrays)
            states.append(state)
        return nnx.merge(self._graphdef, *states)

    def init(self, rng: Array) -> tuple[Tree, Tree]:
        model = self._new_model(rng)
        return _arrays(model, nnx.Param), _arrays(model, nnx.BatchStat)

    def loss(
        self,
        params: Tree,
        model_state: Tree,
        batch: Mapping[str, Array],
        *,
        rng: Array,
        step: Array,
    ) -> tuple[Array, tuple[Tree, dict[str, Array]]]:
        del step  # `rng` already differs from step to step
        # No gradient for what does not train: nothing of it is kept for a backward pass.
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: x if self.trainable(_name(path)) else jax.lax.stop_gradient(x), params
        )
        image_BE, text_BE, model_state = self._encode(params, model_state, batch, rng)
        model = self.model(params, model_state)
        logit_scale = model.logit_scale()
        logit_bias = None if model.logit_bias is None else model.logit_bias[...]
        config = self.config.loss
        labels = _labels(batch, with_ids=config.duplicates != "ignore")
        # The ranks of the tensor axis hold the same rows: they share them where they divide.
        rows_per_device = len(image_BE) // math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        shares = rows_per_device % self.mesh.shape["tensor"] == 0

        def local_loss(
            image_bE: Array, text_bE: Array, scale: Array, bias: Any, labels: dict[str, Array]
        ) -> tuple[Array, dict[str, Array]]:
            return contrastive_loss(
                image_bE,
                text_bE,
                scale,
                bias,
                kind=config.kind,
                axis_names=BATCH_AXES,
                replicated_axis_names=("tensor",) if shares else (),
                duplicates="positive" if config.duplicates == "positive" else "exclude",
                beta=config.beta,
                label_smoothing=config.label_smoothing,
                product_dtype=config.product_dtype,
                tile_size=config.tile_size,
                bidirectional=config.bidirectional,
                **labels,
            )

        rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
        sharded_loss = jax.shard_map(
            local_loss,
            mesh=self.mesh,
            in_specs=(rows, rows, whole, whole, rows),
            out_specs=whole,
        )
        loss, metrics = sharded_loss(image_BE, text_BE, logit_scale, logit_bias, labels)
        metrics |= {"logit_scale": logit_scale}
        if logit_bias is not None:
            metrics |= {"logit_bias": logit_bias}
        return loss, (model_state, metrics)

    def _gathering_model(self, params: Tree, model_state: Tree) -> CLIP:
        """The model with whole weights, but for those that gather themselves where they are used:

        blocks a layer at a time, and the table of tokens.
        """

        def whole(group: Tree, dtype: Any = None) -> Tree:
            kept = ("image", "text", "blocks", "token_embedding")
            rest = {name: leaf for name, leaf in group.items() if name not in kept}
            return group | self.layout.whole(rest, dtype=dtype)

        towers = {
            # Its kernels compute in this dtype; of the text tower, some in float32.
            "image": whole(params["image"], self.execution.dtype),
            "text": whole(params["text"]),
        }
        return self.model(whole(params) | towers, model_state)

    def _encode(
        self, params: Tree, model_state: Tree, batch: Mapping[str, Array], rng: Array
    ) -> tuple[Array, Array, Tree]:
        """Both towers' embeddings [B, E] and the new model state.

        In microbatches that are recomputed going backward. Each gathers its own weights: what fsdp
        splits is whole only where it is in use, and so are its gradients.
        """
        k, num_rows = self.config.microbatches, _num_samples(batch)

        def encode_image(inputs: Mapping[str, Array], model: CLIP | None = None) -> Array:
            model = model or self._gathering_model(params, model_state)
            if not self._image_needs_keys:
                return model.encode_image(inputs)
            # From the place in the global batch: neither devices nor microbatches change the keys.
            keys_B = jax.vmap(lambda row: jax.random.fold_in(rng, row))(inputs["row"])
            return model.encode_image(inputs, row_keys_B=keys_B)

        batch = dict(batch) | {"row": jnp.arange(num_rows)}
        if k == 1:
            model = self._gathering_model(params, model_state)
            embeddings = encode_image(batch, model), model.encode_text(batch)
            return *embeddings, _arrays(model, nnx.BatchStat)
        # Samples that share rows of text stay together: groups are dealt, of one sample each where
        # captions are not packed.
        num_groups = len(batch["tokens"])
        group_size = num_rows // num_groups
        num_devices = math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        if num_groups % (k * num_devices):
            raise ValueError(
                f"a batch of {num_rows}{f' in groups of {group_size}' if group_size > 1 else ''} "
                f"is not divisible by {k} microbatches x {num_devices} data-parallel devices = "
                f"{k * num_devices}"
            )
        # GradCache (Gao et al. 2021): only embeddings are kept, and autodiff runs each microbatch
        # again. Groups are dealt (P/k, k), so every device keeps the rows it has, and each
        # microbatch is cut out where it is used: the batch is never copied.
        by_device = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))

        def deal(x: Array) -> Array:  # [P, ...] or [P * G, ...] to [P/k, k, ...]
            per_group = x.shape[1:] if len(x) == num_groups else (group_size, *x.shape[1:])
            x_pk = x.reshape(num_groups // k, k, *per_group)
            return jax.lax.with_sharding_constraint(x_pk, by_device)

        def cut(x_pk: Array, i: Array, x: Array) -> Array:  # microbatch i of `x`, shaped as it is
            return x_pk[:, i].reshape(len(x) // k, *x.shape[1:])

        dealt = {name: (deal(x), x) for name, x in batch.items()}

        def run(encode: Callable[[Mapping[str, Array]], Array], unroll: bool = False) -> Array:
            def encode_one(_: None, i: Array) -> tuple[None, Array]:
                inputs = {name: cut(x_pk, i, x) for name, (x_pk, x) in dealt.items()}
                return None, encode(inputs).reshape(num_groups // k, -1)

            _, embeddings_kpE = jax.lax.scan(
                jax.checkpoint(encode_one), None, jnp.arange(k), unroll=k if unroll else 1
            )
            return jnp.moveaxis(embeddings_kpE, 0, 1).reshape(num_rows, -1)

        def encode_text(inputs: Mapping[str, Array]) -> Array:
            return self._gathering_model(params, model_state).encode_text(inputs)

        # One tower after the other: their activations are never held together.
        unroll = (
            self.config.model.image.stem == "conv"
            and not self.execution.convolve_in_loops
            and k <= _MOST_UNROLLED
        )
        return run(encode_image, unroll), run(encode_text), model_state

    def constrain(self, params: Tree) -> Tree:
        """Clips the logit scale from above, as CLIP does to keep training stable."""
        highest = jnp.log(self.config.model.logit_scale_max)
        return params | {"log_logit_scale": jnp.minimum(params["log_logit_scale"], highest)}

    def trainable(self, path: str) -> bool:
        return not is_frozen(self.config, path)

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        batch = self.config.global_batch_size
        return _image_spec(self.config.model.image, batch) | _text_spec(self.config)

    def embed(
        self, params: Tree, model_state: Tree, batch: Mapping[str, Array]
    ) -> dict[str, Array]:
        model = self._gathering_model(params, model_state)
        embeddings = {}
        if "image" in batch or "patches" in batch:
            embeddings["image"] = model.encode_image(batch)
        if "tokens" in batch:
            embeddings["text"] = model.encode_text(batch)
        return embeddings

    def flops(self, *, least: bool = False) -> int:
        """Three forward passes per sample: one forward, two backward. The loss is left out.

        A tower that is frozen whole has the forward pass alone. least: of what is needed of the
        last blocks, not of whole ones (`models.forward_flops`).
        """
        packing = self.config.data.packing
        rows_per_text = _rows(packing) / packing.group_size if packing.group_size else 1.0
        image, text = forward_flops(
            self.config.model,
            rows_per_text=rows_per_text,
            training=self._image_trains,
            least=least,
        )
        return (3 if self._image_trains else 1) * image + (3 if self._text_trains else 1) * text


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _arrays(model: CLIP, kind: type[nnx.Variable]) -> Tree:
    arrays: Tree = nnx.to_pure_dict(nnx.state(model, kind))
    return arrays


def _image_spec(image: ImageTowerConfig, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    if image.kind != "naflex":
        shape = (batch, image.image_size, image.image_size, 3)
        return {"image": jax.ShapeDtypeStruct(shape, jnp.uint8)}
    length, pixels = image.max_num_patches, 3 * image.patch_size**2
    return {
        "patches": jax.ShapeDtypeStruct((batch, length, pixels), jnp.uint8),
        "patch_mask": jax.ShapeDtypeStruct((batch, length), jnp.bool_),
        "spatial_shapes": jax.ShapeDtypeStruct((batch, 2), jnp.int32),
    }


def _text_spec(config: ExperimentConfig) -> dict[str, jax.ShapeDtypeStruct]:
    def int32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    batch, length = config.global_batch_size, config.model.text.context_length
    packing = config.data.packing
    if not packing.group_size:
        return {"tokens": int32(batch, length)}
    num_groups = batch // packing.group_size
    tokens_PRL = int32(num_groups, _rows(packing), length)
    return {
        "tokens": tokens_PRL,
        "segments": tokens_PRL,
        "eot": int32(num_groups, packing.group_size),
        "text_id": int32(batch),
    }


def _rows(packing: PackingConfig) -> int:
    if packing.rows is None:
        raise ConfigError(
            "config.data.packing.rows is chosen from the captions when a run starts; here it must "
            f"be given: at most group_size {packing.group_size}"
        )
    return packing.rows


def _num_samples(batch: Mapping[str, Array]) -> int:
    return batch["eot"].size if "eot" in batch else len(batch["tokens"])


def _labels(batch: Mapping[str, Array], *, with_ids: bool) -> dict[str, Array]:
    """What the batch tells of its pairs beside their contents: duplicates and weights."""
    labels = {"weights": batch["weight"]} if "weight" in batch else {}
    if with_ids:
        packed = "text_id" in batch
        labels["text_ids"] = batch["text_id"] if packed else _hash_rows(batch["tokens"])
        if "image_id" in batch:
            labels["image_ids"] = batch["image_id"]
    return labels


def _hash_rows(tokens_BL: Array) -> Array:
    """int32 [B], equal for equal rows (FNV-1a, a token at a time).

    Two different captions of a batch of 32,768 share one by chance in one batch of eight.
    """

    def mix(hash_B: Array, token_B: Array) -> tuple[Array, None]:
        return (hash_B ^ token_B.astype(jnp.uint32)) * jnp.uint32(16777619), None

    start_B = jnp.full(tokens_BL.shape[:1], 2166136261, jnp.uint32)
    hash_B, _ = jax.lax.scan(mix, start_B, tokens_BL.T)
    return jax.lax.bitcast_convert_type(hash_B, jnp.int32)
