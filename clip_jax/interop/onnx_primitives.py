"""From a traced JAX function to an ONNX graph, for the primitives that the towers are made of.

Written here because the converter at hand, jax2onnx, does not go with the rest: 0.13.0, the last
that accepts our Orbax, fails on jax 0.12, and so does the newest (0.17.1) on the text tower. A
traced function is a list of some fifty primitives whose meaning is documented (`jax.lax`) and
has not changed in years; nearly all have an ONNX operator of the same meaning. Layer scans are
unrolled, since their weights are constants.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from clip_jax.config import UserError
from clip_jax.interop.onnx_graph import Dims, Graph, Value, known

# ONNX operators that broadcast as NumPy does and mean the same on every dtype that they meet here.
_ELEMENTWISE = {
    "abs": "Abs",
    "add": "Add",
    "add_any": "Add",
    "and": "And",
    "cos": "Cos",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "not": "Not",
    "or": "Or",
    "pow": "Pow",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tanh": "Tanh",
}
# Elementwise too, of several operators each: see `_composed`.
_COMPOSED = ("erfc", "integer_pow", "ne", "rem", "rsqrt", "select_n", "square")
_IDENTITIES = ("copy", "copy_p", "stop_gradient", "optimization_barrier")
# Primitives that call a function, and the parameter that holds it.
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def add_function(graph: Graph, closed: Any, arguments: Sequence[Value]) -> list[Value]:
    """Adds what `jax.make_jaxpr` returned to the graph; its outputs, written out in full.

    Raises UserError for a primitive that has no counterpart here.
    """
    shapes = [_dims(variable.aval) for variable in closed.jaxpr.outvars]
    outputs = _run(graph, closed, arguments)
    return [graph.expand(value, shape) for value, shape in zip(outputs, shapes, strict=True)]


def _run(graph: Graph, function: Any, arguments: Sequence[Value]) -> list[Value]:
    """`function`: a jaxpr, closed or not."""
    jaxpr = getattr(function, "jaxpr", function)
    values: dict[Any, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
    constants = getattr(function, "consts", ())
    values |= {
        variable: known(content)
        for variable, content in zip(jaxpr.constvars, constants, strict=True)
    }

    def read(variable: Any) -> Value:
        if hasattr(variable, "val"):  # a literal
            return known(np.asarray(variable.val, variable.aval.dtype))
        return values[variable]

    for equation in jaxpr.eqns:
        outputs = _apply(graph, equation, [read(variable) for variable in equation.invars])
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _apply(graph: Graph, equation: Any, inputs: list[Value]) -> list[Value]:
    primitive, parameters = equation.primitive.name, equation.params
    # What moves nothing or repeats nothing works on arrays as they are stored.
    if primitive == "scan":
        return _scan(graph, equation, inputs)
    for name in _CALLS:
        if name in parameters:
            return _run(graph, parameters[name], inputs)
    if primitive in _IDENTITIES:
        return inputs
    out = equation.outvars[0].aval
    if primitive == "broadcast_in_dim":
        places = parameters["broadcast_dimensions"]
        return [graph.insert_axes(inputs[0], len(out.shape), places)]
    if primitive == "transpose":
        return [graph.transpose(inputs[0], parameters["permutation"])]
    if primitive == "convert_element_type":
        return [graph.cast(inputs[0], out.dtype)]
    if primitive in _ELEMENTWISE or primitive in _COMPOSED:
        return [_elementwise(graph, equation, inputs)]
    # The others take whole arrays. What is known beforehand is computed beforehand.
    inputs = [
        graph.expand(value, _dims(variable.aval))
        for value, variable in zip(inputs, equation.invars, strict=True)
    ]
    shapes = [_dims(variable.aval) for variable in equation.outvars]
    free = any(isinstance(dim, str) for shape in shapes for dim in shape)
    if not free and all(value.array is not None for value in inputs):
        return _evaluate(equation, [value.array for value in inputs])
    if primitive == "unstack":
        return _unstack(graph, equation, shapes[0], inputs[0])
    if primitive not in _OPERATORS:
        raise UserError(
            f"the model computes {primitive!r}, which the ONNX export does not know; please report "
            "it with the model's config"
        )
    return [_OPERATORS[primitive](graph, equation, shapes[0], *inputs)]


def _dims(aval: Any) -> Dims:
    return tuple(dim if isinstance(dim, int) else str(dim) for dim in aval.shape)


def _evaluate(equation: Any, arrays: Sequence[Any]) -> list[Value]:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        results = equation.primitive.bind(*map(jax.numpy.asarray, arrays), **equation.params)
    if not equation.primitive.multiple_results:
        results = [results]
    return [known(np.asarray(result)) for result in results]


# ---- Elementwise -----------------------------------------------------------------------------


def _elementwise(graph: Graph, equation: Any, inputs: list[Value]) -> Value:
    rank = len(equation.outvars[0].aval.shape)
    shape = tuple(_widest(inputs, axis - rank) for axis in range(rank))
    if all(value.array is not None for value in inputs):
        sizes = [int(dim) for dim in shape]
        whole = [np.broadcast_to(value.array, sizes) for value in inputs if value.array is not None]
        return _evaluate(equation, whole)[0]
    dtype = equation.outvars[0].aval.dtype
    primitive = equation.primitive.name
    if primitive in _ELEMENTWISE:
        return graph.node(_ELEMENTWISE[primitive], inputs, shape, dtype)
    return _composed(graph, equation, inputs, shape, dtype)


def _widest(inputs: Sequence[Value], axis: int) -> int | str:
    """The size of an axis, counted from the last, over values that may repeat along it."""
    sizes = [value.shape[axis] for value in inputs if len(value.shape) >= -axis]
    return next((size for size in sizes if size != 1), 1)


def _composed(graph: Graph, equation: Any, inputs: list[Value], shape: Dims, dtype: Any) -> Value:
    def node(operator: str, *values: Value, **attributes: Any) -> Value:
        return graph.node(operator, values, shape, values[0].dtype, **attributes)

    x = inputs[0]
    match equation.primitive.name:
        case "square":
            return node("Mul", x, x)
        case "rsqrt":
            return node("Reciprocal", node("Sqrt", x))
        case "erfc":
            return node("Sub", known(np.ones((), x.dtype)), node("Erf", x))
        case "integer_pow":
            return node("Pow", x, known(np.asarray(equation.params["y"], x.dtype)))
        case "ne":
            return node("Not", graph.node("Equal", inputs, shape, dtype))
        case "rem":  # the sign of the dividend, as C
            return node("Mod", *inputs, fmod=1)
        case "select_n":
            if len(inputs) != 3 or x.dtype != np.bool_:
                raise UserError("the ONNX export knows no choice among more than two arrays")
            if_false, if_true = inputs[1:]
            if dtype == np.bool_:  # for which onnxruntime has no Where
                return node("Or", node("And", x, if_true), node("And", node("Not", x), if_false))
            return graph.node("Where", [x, if_true, if_false], shape, dtype)
        case name:
            raise AssertionError(name)


# ---- Functions -------------------------------------------------------------------------------


def _scan(graph: Graph, equation: Any, inputs: list[Value]) -> list[Value]:
    """Constants, carry, and arrays with a leading axis that is cut: told apart by their shapes.

    How many there are of each stands under other names in each version of jax.
    """
    parameters = equation.params
    body = getattr(parameters["jaxpr"], "jaxpr", parameters["jaxpr"])
    num_whole = sum(
        outer.aval.shape == inner.aval.shape
        for outer, inner in zip(equation.invars, body.invars, strict=True)
    )
    if any(
        outer.aval.shape != inner.aval.shape
        for outer, inner in zip(equation.outvars, body.outvars, strict=True)
    ):
        raise UserError("the ONNX export knows scans that keep their last state only")
    num_constants = num_whole - len(equation.outvars)
    constants, carry = inputs[:num_constants], inputs[num_constants:num_whole]
    order = range(parameters["length"])
    for i in reversed(order) if parameters["reverse"] else order:
        slices = []
        for value in inputs[num_whole:]:
            if value.array is None:
                raise UserError("the ONNX export knows scans over weights only")
            layer = value.array[0 if value.shape[0] == 1 else i]
            slices.append(known(layer, f"{value.label}/{i}" if value.label else ""))
        carry = _run(graph, parameters["jaxpr"], [*constants, *carry, *slices])
    return carry


# ---- Operators on whole arrays ---------------------------------------------------------------


def _reshape(graph: Graph, equation: Any, shape: Dims, x: Value) -> Value:
    return graph.reshape(x, shape)


def _reduce(operator: str) -> Callable[..., Value]:
    def add(graph: Graph, equation: Any, shape: Dims, x: Value) -> Value:
        dtype = equation.outvars[0].aval.dtype
        axes = known(np.array(equation.params["axes"], np.int64))
        if x.dtype == np.bool_:  # any and all
            x = graph.cast(x, np.int32)
        reduced = graph.node(operator, [x, axes], shape, x.dtype, keepdims=0)
        return graph.cast(reduced, dtype)

    return add


def _argmax(graph: Graph, equation: Any, shape: Dims, x: Value) -> Value:
    if x.dtype == np.bool_:
        x = graph.cast(x, np.int32)
    (axis,) = equation.params["axes"]
    index = graph.node("ArgMax", [x], shape, np.int64, axis=axis, keepdims=0)
    return graph.cast(index, equation.params["index_dtype"])


def _cumsum(graph: Graph, equation: Any, shape: Dims, x: Value) -> Value:
    axis = known(np.array(equation.params["axis"], np.int64))
    reverse = int(equation.params["reverse"])
    return graph.node("CumSum", [x, axis], shape, x.dtype, reverse=reverse)


def _concatenate(graph: Graph, equation: Any, shape: Dims, *parts: Value) -> Value:
    axis = equation.params["dimension"]
    return graph.node("Concat", parts, shape, parts[0].dtype, axis=axis)


def _unstack(graph: Graph, equation: Any, shape: Dims, x: Value) -> list[Value]:
    axis = equation.params["axis"]
    cuts = [_cut(graph, x, {axis: (i, i + 1)}) for i in range(int(x.shape[axis]))]
    return [graph.reshape(cut, shape) for cut in cuts]


def _slice(graph: Graph, equation: Any, shape: Dims, x: Value) -> Value:
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    if set(equation.params["strides"] or ()) - {1}:
        raise UserError("the ONNX export knows no slices with strides")
    axes = [i for i, dim in enumerate(shape) if dim != x.shape[i]]
    return _cut(graph, x, {i: (int(starts[i]), int(limits[i])) for i in axes})


def _cut(graph: Graph, x: Value, bounds: Mapping[int, tuple[int, int]]) -> Value:
    """x[..., start:end, ...] by axis."""
    if not bounds:
        return x
    shape = tuple(
        bounds[i][1] - bounds[i][0] if i in bounds else dim for i, dim in enumerate(x.shape)
    )
    starts, ends = zip(*bounds.values(), strict=True)
    where = [known(np.array(numbers, np.int64)) for numbers in (starts, ends, list(bounds))]
    return graph.node("Slice", [x, *where], shape, x.dtype)


def _dot_general(graph: Graph, equation: Any, shape: Dims, x: Value, y: Value) -> Value:
    (x_summed, y_summed), (x_batch, y_batch) = equation.params["dimension_numbers"]
    x_free = [i for i in range(len(x.shape)) if i not in (*x_summed, *x_batch)]
    y_free = [i for i in range(len(y.shape)) if i not in (*y_summed, *y_batch)]
    batch = tuple(x.shape[i] for i in x_batch)
    rows, columns = ([v.shape[i] for i in f] for v, f in ((x, x_free), (y, y_free)))
    summed = math.prod(int(x.shape[i]) for i in x_summed)
    x = graph.transpose(x, (*x_batch, *x_free, *x_summed))
    y = graph.transpose(y, (*y_batch, *y_summed, *y_free))
    # MatMul takes a stack of matrices; without a batch the rows may stay several axes.
    x_rows = (_product(rows),) if batch or not rows else tuple(rows)
    x = graph.reshape(x, (*batch, *x_rows, summed))
    y = graph.reshape(y, (*batch, summed, _product(columns)))
    product = graph.node("MatMul", [x, y], (*batch, *x_rows, _product(columns)), x.dtype)
    return graph.reshape(product, shape)


def _product(dims: Sequence[int | str]) -> int | str:
    free = [dim for dim in dims if isinstance(dim, str)]
    size = math.prod(dim for dim in dims if isinstance(dim, int))
    if not free:
        return size
    return "*".join(free if size == 1 else [str(size), *free])


def _gather(graph: Graph, equation: Any, shape: Dims, x: Value, index: Value) -> Value:
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    rows = numbers.operand_batching_dims
    axis = len(rows)
    if index.array is not None and index.array.ndim == 1 and not rows:  # x[:, 3:] or x[:, 3]
        starts = dict(zip(numbers.start_index_map, index.array.tolist(), strict=True))
        bounds = {i: (start, start + int(sizes[i])) for i, start in starts.items()}
        return graph.reshape(_cut(graph, x, bounds), shape)
    if (
        numbers.start_index_map == numbers.collapsed_slice_dims
        and len(numbers.start_index_map) == 1
    ):
        (taken,) = numbers.start_index_map
        whole = [i for i in range(len(x.shape)) if i != taken and i not in rows]
        is_whole = all(str(sizes[i]) == str(x.shape[i]) for i in whole)
        if not rows and is_whole:  # x[:, index]
            index = graph.reshape(index, index.shape[:-1])
            places = [i for i in range(len(shape)) if i not in numbers.offset_dims]
            # ONNX puts the axes of the index where the axis was that it picks from.
            order = (*numbers.offset_dims[:taken], *places, *numbers.offset_dims[taken:])
            gathered = tuple(shape[i] for i in order)
            picked = graph.node("Gather", [x, index], gathered, x.dtype, axis=taken)
            return graph.transpose(picked, np.argsort(order).tolist())
        leading = tuple(range(axis))
        trailing = tuple(range(len(shape) - len(whole), len(shape)))
        if (
            rows == numbers.start_indices_batching_dims == leading
            and taken == axis
            and is_whole
            and numbers.offset_dims == trailing
        ):  # x[row, index[row]] for each row
            index = graph.cast(index, np.int64)
            return graph.node("GatherND", [x, index], shape, x.dtype, batch_dims=axis)
    raise UserError(f"the ONNX export knows no gather like {numbers} of {sizes} in {x.shape}")


def _convolution(graph: Graph, equation: Any, shape: Dims, x: Value, kernel: Value) -> Value:
    parameters = equation.params
    x_spec, kernel_spec, out_spec = parameters["dimension_numbers"]
    if set(parameters["lhs_dilation"]) != {1} or parameters["batch_group_count"] != 1:
        raise UserError("the ONNX export knows no transposed convolutions")
    low, high = zip(*parameters["padding"], strict=True)
    convolved = graph.node(
        "Conv",
        [graph.transpose(x, x_spec), graph.transpose(kernel, kernel_spec)],
        tuple(shape[i] for i in out_spec),
        x.dtype,
        strides=list(parameters["window_strides"]),
        pads=[*low, *high],
        dilations=list(parameters["rhs_dilation"]),
        group=parameters["feature_group_count"],
    )
    return graph.transpose(convolved, np.argsort(out_spec).tolist())


_OPERATORS: dict[str, Callable[..., Value]] = {
    "argmax": _argmax,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "cumsum": _cumsum,
    "dot_general": _dot_general,
    "gather": _gather,
    "reduce_and": _reduce("ReduceMin"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_or": _reduce("ReduceMax"),
    "reduce_sum": _reduce("ReduceSum"),
    "reshape": _reshape,
    "slice": _slice,
    "squeeze": _reshape,
}
