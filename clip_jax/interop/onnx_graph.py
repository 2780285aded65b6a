"""ONNX graphs: values, nodes and constants, and the file they become.

Shapes hold whole numbers, and strings for what is free ('batch', '49*batch').
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from clip_jax.interop.table import NdArray

Dim = int | str
Dims = tuple[Dim, ...]

BATCH = "batch"
# 18: the first opset that takes the axes of all reductions as inputs; onnxruntime 1.14 reads it.
OPSET, IR_VERSION = 18, 8
# A protobuf message holds 2 GiB at most: beyond it, weights lie in a file beside the graph.
MOST_INLINE_BYTES = 2**31 - 2**26
_MOST_COMPARED_BYTES = 64  # of constants that are stored once however often they occur
_FEWEST_EXTERNAL_BYTES = 1024  # runtimes look at sizes and axes before they read other files
_ALIGNMENT = 4096  # bytes, of arrays in that file, so that runtimes can map them into memory


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Value:
    """An array of the graph: known, or the output of a node.

    shape: as it is stored, 1 where the array it stands for repeats along an axis: broadcasts cost
    nothing until something needs them written out. label: where known arrays come from, for names.
    """

    shape: Dims
    dtype: np.dtype[Any]
    name: str = ""
    array: NdArray | None = None
    label: str = ""


def known(array: Any, label: str = "") -> Value:
    """A value from an array."""
    content = np.asarray(array)
    return Value(shape=content.shape, dtype=content.dtype, array=content, label=label)


class Graph:
    """Nodes in order, each array a `Value`; methods add nodes and return what comes out."""

    def __init__(self) -> None:
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, NdArray] = {}
        self._names_of_arrays: dict[Any, str] = {}
        self._counts: dict[str, int] = {}
        self._batch: Value | None = None

    # ---- Values and nodes ----------------------------------------------------------------------

    def input(self, name: str, shape: Dims, dtype: Any) -> Value:
        """A graph input. The first axis of the first one is the batch."""
        value = Value(shape=shape, dtype=np.dtype(dtype), name=name)
        self.inputs.append(_value_info(value))
        return value

    def output(self, name: str, value: Value) -> None:
        self._add("Identity", [self.name(value)], name, {})
        self.outputs.append(_value_info(dataclasses.replace(value, name=name)))

    def node(
        self, operator: str, inputs: Sequence[Value], shape: Dims, dtype: Any, **attributes: Any
    ) -> Value:
        """A node with one output, of a shape and dtype that the caller knows."""
        name = self._unique(operator)
        self._add(operator, [self.name(value) for value in inputs], name, attributes)
        return Value(shape=tuple(shape), dtype=np.dtype(dtype), name=name)

    def name(self, value: Value) -> str:
        """What nodes call a value; a known one becomes a constant of the graph."""
        if value.array is None:
            return value.name
        array = value.array
        key: Any = id(array)
        if array.nbytes <= _MOST_COMPARED_BYTES:
            key = (array.dtype, array.shape, array.tobytes())
        if key not in self._names_of_arrays:
            name = self._unique(value.label or "constant")
            self.constants[name] = array  # kept, so that no other array takes its id
            self._names_of_arrays[key] = name
        return self._names_of_arrays[key]

    def _add(self, operator: str, inputs: list[str], output: str, attributes: Any) -> None:
        self.nodes.append(onnx.helper.make_node(operator, inputs, [output], output, **attributes))

    def _unique(self, name: str) -> str:
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        return f"{name}:{count}" if count else name

    # ---- Shapes --------------------------------------------------------------------------------

    def cast(self, value: Value, dtype: Any) -> Value:
        dtype = np.dtype(dtype)
        if value.dtype == dtype:
            return value
        if value.array is not None:
            return known(value.array.astype(dtype), value.label)
        return self.node("Cast", [value], value.shape, dtype, to=_element_type(dtype))

    def transpose(self, value: Value, permutation: Sequence[int]) -> Value:
        if list(permutation) == list(range(len(value.shape))):
            return value
        if value.array is not None:
            return known(value.array.transpose(permutation), value.label)
        shape = tuple(value.shape[i] for i in permutation)
        return self.node("Transpose", [value], shape, value.dtype, perm=list(permutation))

    def reshape(self, value: Value, shape: Dims) -> Value:
        """shape: with at most one free axis, which the others leave no choice."""
        if value.shape == tuple(shape):
            return value
        sizes = [-1 if isinstance(dim, str) else dim for dim in shape]
        assert sizes.count(-1) <= 1, f"reshape to {shape}"
        if value.array is not None:
            return known(value.array.reshape(sizes), value.label)
        return self.node("Reshape", [value, _sizes(sizes)], shape, value.dtype)

    def insert_axes(self, value: Value, rank: int, places: Sequence[int]) -> Value:
        """Axes of size 1 all round: axis i of `value` becomes axis `places[i]` of `rank`."""
        shape: list[Dim] = [1] * rank
        for dim, place in zip(value.shape, places, strict=True):
            shape[place] = dim
        if value.array is not None:
            return known(value.array.reshape([int(dim) for dim in shape]), value.label)
        new = [axis for axis in range(rank) if axis not in places]
        if not new:
            return value
        return self.node("Unsqueeze", [value, _sizes(new)], tuple(shape), value.dtype)

    def expand(self, value: Value, shape: Dims) -> Value:
        """Writes out what is stored once and repeats."""
        value = self.insert_axes(
            value, len(shape), range(len(shape) - len(value.shape), len(shape))
        )
        if value.shape == tuple(shape):
            return value
        repeats_rows = any(
            isinstance(dim, str) and stored == 1
            for dim, stored in zip(shape, value.shape, strict=True)
        )
        if value.array is not None and not repeats_rows:
            return known(np.broadcast_to(value.array, [int(dim) for dim in shape]), value.label)
        # ONNX broadcasts both ways: 1 keeps an axis that is there.
        parts = [
            self._batch_size() if stored == 1 and dim == BATCH else _sizes([_size_or_1(dim)])
            for dim, stored in zip(shape, value.shape, strict=True)
        ]
        odd = [d for d, s in zip(shape, value.shape, strict=True) if s == 1 and d != BATCH]
        assert all(isinstance(dim, int) for dim in odd), f"broadcast to {shape}"
        if repeats_rows:
            sizes = self.node("Concat", parts, (len(shape),), np.int64, axis=0)
        else:
            sizes = _sizes([_size_or_1(dim) for dim in shape])
        return self.node("Expand", [value, sizes], shape, value.dtype)

    def _batch_size(self) -> Value:
        """The number of rows, int64 [1]."""
        if self._batch is None:
            source = self.inputs[0]
            value = Value(shape=(BATCH,), dtype=np.dtype(np.int64), name=source.name)
            self._batch = self.node("Shape", [value], (1,), np.int64, start=0, end=1)
        return self._batch

    # ---- The file ------------------------------------------------------------------------------

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Writes `path`, and `path`.data beside it where the constants are too large for one file.

        metadata: kept in the model as strings by name.
        """
        size = sum(array.nbytes for array in self.constants.values())
        fewest = _FEWEST_EXTERNAL_BYTES if size > MOST_INLINE_BYTES else size + 1
        inline = {n: array for n, array in self.constants.items() if array.nbytes < fewest}
        outside = {n: array for n, array in self.constants.items() if array.nbytes >= fewest}
        tensors = [_tensor(name, array) for name, array in inline.items()]
        if outside:
            tensors += _write_external(path.with_name(path.name + ".data"), outside)
        graph = onnx.helper.make_graph(self.nodes, path.stem, self.inputs, self.outputs, tensors)
        model = onnx.helper.make_model(
            graph,
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="clip_jax",
        )
        onnx.helper.set_model_props(model, dict(metadata))
        path.write_bytes(model.SerializeToString())


def _write_external(path: Path, arrays: Mapping[str, NdArray]) -> list[onnx.TensorProto]:
    tensors = []
    with path.open("wb") as file:
        for name, array in arrays.items():
            file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
            content = np.ascontiguousarray(array)
            tensor = onnx.TensorProto(
                name=name, dims=array.shape, data_type=_element_type(array.dtype)
            )
            tensor.data_location = onnx.TensorProto.EXTERNAL
            place = {"location": path.name, "offset": file.tell(), "length": content.nbytes}
            for key, entry in place.items():
                tensor.external_data.add(key=key, value=str(entry))
            content.tofile(file)
            tensors.append(tensor)
        file.flush()
        os.fsync(file.fileno())
    return tensors


def _tensor(name: str, array: NdArray) -> onnx.TensorProto:
    return onnx.TensorProto(
        name=name,
        dims=array.shape,
        data_type=_element_type(array.dtype),
        raw_data=array.tobytes(),
    )


def _value_info(value: Value) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(value.name, _element_type(value.dtype), value.shape)


def _element_type(dtype: Any) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _sizes(sizes: Sequence[int]) -> Value:
    return known(np.array(sizes, np.int64))


def _size_or_1(dim: Dim) -> int:
    return 1 if isinstance(dim, str) else dim
