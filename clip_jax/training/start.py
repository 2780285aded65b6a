"""Weights that a run starts from: those of other runs and of imported checkpoints."""

import contextlib
from typing import Any

import jax
from numpy.typing import NDArray

from clip_jax.checkpoint import CheckpointStore, Workdir, leaves_by_path
from clip_jax.config import ExperimentConfig, ModelConfig, StartConfig, UserError
from clip_jax.models import resample_position_embedding, stretch_position_embedding
from clip_jax.parallel import from_first_process
from clip_jax.training.state import TrainState

NdArray = NDArray[Any]


def starting_arrays(config: ExperimentConfig, abstract: TrainState) -> dict[str, NdArray]:
    """What `config.start` names, by path below `params` and `model_state`, on the host.

    Position embeddings of images are resampled to the run's resolution, those of texts cut or
    stretched to its context length. Raises UserError where a checkpoint is missing or does not fit.
    """
    arrays: dict[str, NdArray] = {}
    wanted = leaves_by_path(abstract.params) | leaves_by_path(abstract.model_state)
    for part in ("model", "image", "text"):  # a single tower takes the place of the model's
        folder = getattr(config.start, part)
        if folder is not None:
            arrays |= _arrays_of(folder, part, config, wanted)
    return arrays


def with_arrays(state: TrainState, arrays: dict[str, NdArray]) -> TrainState:
    """`state` with its parameters and model state replaced where `arrays` has them."""

    def place(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        array = arrays.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        if array is None:
            return leaf
        # Each device takes its own part: no device holds a whole array for that.
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: array[index].astype(leaf.dtype)
        )

    replaced = {
        name: jax.tree_util.tree_map_with_path(place, getattr(state, name))
        for name in ("params", "model_state", "ema")
    }
    return state._replace(**replaced)


def agreed_step(store: CheckpointStore, step: int | None) -> int | None:
    """`step`, or the latest as the first process sees it: a run that goes on may save meanwhile."""
    if step is not None:
        return step
    latest = from_first_process(-1 if (found := store.latest_step()) is None else found)
    return None if latest < 0 else latest


def describe(start: StartConfig) -> str:
    """`model from runs/a, image from runs/b`, or nothing."""
    named = {part: getattr(start, part) for part in ("model", "image", "text")}
    return ", ".join(f"{part} from {folder}" for part, folder in named.items() if folder)


def _arrays_of(
    folder: str, part: str, config: ExperimentConfig, wanted: dict[str, Any]
) -> dict[str, NdArray]:
    workdir, model = Workdir(folder), config.model
    saved = workdir.load_config().model
    weights = "ema" if config.start.use_ema else "params"
    with contextlib.closing(CheckpointStore(workdir.checkpoints)) as store:
        step = agreed_step(store, config.start.step)
        groups = store.load((weights, "model_state"), step)
    if not groups[weights]:
        raise UserError(
            f"config.start.{part} {folder} has no moving average of its weights; use "
            "config.start.use_ema=False"
        )
    found = leaves_by_path(groups[weights]) | leaves_by_path(groups["model_state"])
    if part != "model":
        wanted = {path: leaf for path, leaf in wanted.items() if path.startswith(f"{part}/")}
        found = {path: array for path, array in found.items() if path.startswith(f"{part}/")}
        if not found:
            raise UserError(f"config.start.{part} {folder} holds no {part} tower")
    for path, leaf in wanted.items():
        if path not in found:
            raise UserError(f"config.start.{part} {folder} has no {path}, which the model needs")
        array = _fitted(path, found[path], leaf.shape, saved, model)
        if array.shape != leaf.shape:
            raise UserError(
                f"config.start.{part} {folder} has {path} with shape {array.shape}, but the model "
                f"needs {leaf.shape}"
            )
        found[path] = array
    if surplus := [path for path in found if path not in wanted]:
        raise UserError(
            f"config.start.{part} {folder} has {surplus[0]}, which the model has no place for"
        )
    return found


def _fitted(
    path: str, array: NdArray, shape: tuple[int, ...], saved: ModelConfig, model: ModelConfig
) -> NdArray:
    """Position embeddings for another resolution or another context length."""
    if path == "text/position_embedding" and array.shape[1:] == shape[1:]:
        if array.shape[0] >= shape[0]:
            return array[: shape[0]]
        stretched: NdArray = stretch_position_embedding(array, shape[0])
        return stretched
    if path not in ("image/position_embedding", "image/pooling/position_embedding"):
        return array
    if array.shape == shape or array.shape[1:] != shape[1:]:
        return array
    old, new = (side.image_size // side.patch_size for side in (saved.image, model.image))
    num_prefix = shape[0] - new * new
    if array.shape[0] - old * old != num_prefix:
        return array  # another number of class tokens: the caller names the shapes
    resampled: NdArray = resample_position_embedding(
        array, (old, old), (new, new), num_prefix=num_prefix
    )
    return resampled
