"""ONNX files of the two towers, checked against onnxruntime.

Inputs and outputs, whose first axis is the free batch:
 image.onnx  `image` float32 [batch, 3, S, S], normalised; channels first, as in the ONNX files that
             PyTorch libraries write. A 'naflex' tower: `patches` float32 [batch, N, P * P * 3],
             normalised, `patch_mask` bool [batch, N], `spatial_shapes` int32 [batch, 2].
 text.onnx   `tokens` int32 [batch, L].
 Both give   `embedding` float32 [batch, E], projected and of unit length.
Beside them `preprocess.json` says how pictures become pixels, with logit scale and bias, and
`tokenizer.json` is the tokenizer where the model has one.

Shape suffixes: B batch, S image side, N patches, P patch side, L tokens, E embedding width.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from clip_jax.checkpoint import unflatten
from clip_jax.config import ModelConfig, UserError
from clip_jax.interop.huggingface_files import write_json
from clip_jax.interop.table import NdArray
from clip_jax.interop.transfer import staged
from clip_jax.interop.weights import PARTS, Weights
from clip_jax.models import CLIP

TOLERANCE = 1e-4  # of unit-length embeddings, against onnxruntime
_CHECKED_BATCHES = (1, 3)  # of the same rows

Inputs = dict[str, NdArray]
Encode = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]


def export_onnx(weights: Weights, directory: Path) -> list[str]:
    """Writes both towers and returns what was checked, one line each.

    directory: new or empty; it appears when all is written and checked, or not at all. Raises
    UserError if it is not empty, for a single tower (which has no projection), where onnx or
    onnxruntime is not installed, and where embeddings differ from ours by more than TOLERANCE.
    """
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"the ONNX export takes {package}: pip install 'clip-jax-training[onnx]'"
            )
    if weights.parts != PARTS:
        raise UserError(
            f"ONNX files hold embeddings, and a single {weights.parts[0]} tower has no projection "
            "to them; train it in a model first"
        )
    arrays = {path: np.asarray(array, np.float32) for path, array in weights.arrays.items()}
    with staged(Path(directory)) as folder:
        lines = [
            _export_tower(weights.model, part, encode, arrays, folder / f"{part}.onnx")
            for part, encode in _encoders(weights.model).items()
        ]
        write_json(folder / "preprocess.json", _settings(weights, arrays))
        if weights.tokenizer is not None:
            weights.tokenizer.save(folder / "tokenizer.json")
    return lines


def _export_tower(
    model: ModelConfig, part: str, encode: Encode, arrays: Mapping[str, NdArray], path: Path
) -> str:
    """Writes one file, runs it, and says how near it is."""
    from clip_jax.interop.onnx_graph import BATCH, Graph, known
    from clip_jax.interop.onnx_primitives import add_function

    prefixes = (f"{part}/", f"{part}_projection/")
    params = {name: array for name, array in arrays.items() if name.startswith(prefixes)}
    examples = _example_inputs(model, part, max(_CHECKED_BATCHES))
    (batch,) = jax.export.symbolic_shape(BATCH)
    free = {
        name: jax.ShapeDtypeStruct((batch, *array.shape[1:]), array.dtype)
        for name, array in examples.items()
    }
    graph = Graph()
    inputs = {
        name: graph.input(name, (BATCH, *array.shape[1:]), array.dtype)
        for name, array in examples.items()
    }
    constants = {name: known(array, label=name) for name, array in params.items()}
    # Leaves in the order in which the traced function takes them.
    leaves = jax.tree.leaves((constants, inputs))
    (embedding,) = add_function(graph, jax.make_jaxpr(encode)(params, free), leaves)
    graph.output("embedding", embedding)
    graph.save(path, {"model": model.name, "producer": "clip_jax"})
    expected = np.asarray(jax.jit(encode)(params, examples))
    difference, runtime = _difference(path, examples, expected)
    if not difference <= TOLERANCE:  # NaN too
        raise UserError(
            f"{path.name} differs from the model by {difference:.1e} in {runtime}, more than "
            f"{TOLERANCE:.0e}; nothing is written"
        )
    return (
        f"{path.name}: {len(graph.nodes)} nodes, {len(graph.constants)} constants; embeddings of "
        f"batches of 1 and 3 within {difference:.1e} of ours in {runtime}"
    )


def _encoders(model: ModelConfig) -> dict[str, Encode]:
    """By tower, functions of arrays by path and of inputs to embeddings [B, E]."""
    abstract = jax.eval_shape(lambda key: CLIP(model, rngs=nnx.Rngs(key)), jax.random.key(0))
    graphdef, abstract_state = nnx.split(abstract)

    def clip(params: Mapping[str, Any]) -> CLIP:
        state: Any = jax.tree.map(lambda leaf: leaf, abstract_state)
        # Parameters of the other tower stay abstract: nothing reads them.
        nnx.replace_by_pure_dict(state, unflatten(params))
        return nnx.merge(graphdef, state)

    def encode_image(params: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
        if "image" in inputs:
            inputs = {"image": inputs["image"].transpose(0, 2, 3, 1)}
        return clip(params).encode_image(inputs)

    def encode_text(params: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
        return clip(params).encode_text(inputs)

    highest = jax.default_matmul_precision("highest")
    return {"image": highest(encode_image), "text": highest(encode_text)}


def _example_inputs(model: ModelConfig, part: str, count: int) -> Inputs:
    """Random inputs of `count` rows, the same ones every time."""
    rng = np.random.default_rng(0)
    image, text = model.image, model.text
    if part == "text":
        tokens = rng.integers(0, text.vocab_size, (count, text.context_length), dtype=np.int32)
        ends = rng.integers(1, text.context_length, count)
        for row, end in zip(tokens, ends, strict=True):
            row[end:] = text.pad_id
            if text.eot_id is not None:
                row[end] = text.eot_id
        return {"tokens": tokens}
    if image.kind == "naflex":
        patch_values = 3 * image.patch_size**2
        patches = rng.standard_normal((count, image.max_num_patches, patch_values), np.float32)
        side = math.isqrt(image.max_num_patches)
        shapes = rng.integers(1, side + 1, (count, 2)).astype(np.int32)
        shapes[-1] = 1, image.max_num_patches
        mask = np.arange(image.max_num_patches) < shapes.prod(axis=1)[:, None]
        return {"patches": patches, "patch_mask": mask, "spatial_shapes": shapes}
    shape = (count, 3, image.image_size, image.image_size)
    return {"image": rng.standard_normal(shape, np.float32)}


def _difference(
    path: Path, examples: Inputs, expected_BE: NDArray[np.float32]
) -> tuple[float, str]:
    """The largest difference between what a file gives and what it should; and who ran it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    differences = []
    for count in _CHECKED_BATCHES:
        rows = {name: array[:count] for name, array in examples.items()}
        (found_BE,) = session.run(["embedding"], rows)
        assert found_BE.shape == (count, expected_BE.shape[1]), found_BE.shape
        differences.append(np.abs(found_BE - expected_BE[:count]).max())  # NaN stays NaN
    return float(np.max(differences)), f"onnxruntime {onnxruntime.__version__}"


def _settings(weights: Weights, arrays: Mapping[str, NdArray]) -> dict[str, Any]:
    """What a user of the files must know and no file holds."""
    model, bias = weights.model, arrays.get("logit_bias")
    image, text = model.image, model.text
    names = ["image_size", "patch_size", "resize", "interpolation", "mean", "std"]
    if image.kind == "naflex":
        names = ["patch_size", "max_num_patches", "interpolation", "mean", "std"]
    fields = dataclasses.asdict(image)
    return {
        "model": model.name,
        "framing": weights.extras.get("framing", "crop"),  # of training, see `DataConfig`
        "image": {
            "inputs": "patches, patch_mask, spatial_shapes" if image.kind == "naflex" else "image",
            **({} if image.kind == "naflex" else {"layout": "NCHW"}),
            **{name: fields[name] for name in names},
        },
        "text": {
            "context_length": text.context_length,
            "eot_id": text.eot_id,
            "pad_id": text.pad_id,
        },
        "embed_dim": model.embed_dim,
        "logit_scale": float(np.exp(np.float64(arrays["log_logit_scale"]))),
        "logit_bias": None if bias is None else float(bias),
    }
