"""Runs a saved Core ML ML program without a Mac: each operation in NumPy, at the precision that the file declares.

What a `.mlpackage` computes is proven from the file itself, specification and weights as Core ML would read them, not
from the graph that the converter had in memory. The format is Apple's `MIL.proto`, `Model.proto` and
`FeatureTypes.proto`; what each operation means is said by the operation sets iOS15 to iOS18 of coremltools.

Precision: fp16 numbers are held in fp32 arrays. An operation computes in fp32 (sums, matrix products, softmax and
norms accumulate there), then its result is rounded once to the declared type. For addition, subtraction,
multiplication, division and square root that is exactly fp16 arithmetic. An accelerator may accumulate in less, so
that its last bits may differ.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Feature(NamedTuple):
    """What an input or output may be.

    Args:
        shapes: one, or several if the shape is enumerated. A size is an integer, a `range` of what is allowed, or
            None where only the computation tells.
        dtype: of the array.
    """

    shapes: tuple[tuple[int | range | None, ...], ...]
    dtype: np.dtype


class Step(NamedTuple):
    """One operation. Arguments and outputs are names of values; only the parameter `values` takes several."""

    type: str
    arguments: dict[str, list[str]]
    outputs: dict[str, np.dtype]


class MilProgram:
    """A Core ML ML program, run operation by operation.

    `predict` and `make_state` mirror those of coremltools' `MLModel`.

    Args:
        package: path of a `.mlpackage`.
        function: which function of the program.

    Attributes:
        inputs: a [`Feature`] by name.
        outputs: a [`Feature`] by name.

    Raises:
        ImportError: coremltools is missing.
        NotImplementedError: the program has operations that are not in `OPERATIONS`; all of them are named.
        ValueError: there is no such package, it is not an ML program, or it has no such function.
    """

    def __init__(self, package: str | os.PathLike, function: str = "main"):
        spec, folder = _load_spec(Path(package))
        program = spec.mlProgram.functions
        if function not in program:
            raise ValueError(f"function={function!r}: {package} has {sorted(program)}. Pass one of these.")
        graph = program[function]
        block = graph.block_specializations[graph.opset]
        _refuse_unknown(block.operations)

        described = {each.name: each for each in spec.description.functions}.get(function, spec.description)
        self.inputs = {each.name: _feature(each) for each in described.input}
        self._states = {each.name: _tensor(each.type) for each in graph.inputs if each.type.HasField("stateType")}
        self._steps, self._constants = _read_block(block, folder)
        types = {each.name: _tensor(each.type) for each in graph.inputs}
        types.update((each.name, _tensor(each.type)) for step in block.operations for each in step.outputs)
        self._results = list(block.outputs)
        self.outputs = {name: types[name] for name in self._results}

    def make_state(self) -> dict[str, np.ndarray]:
        """Zeros for each state, as declared (fp16 in every program that coremltools writes)."""
        return {name: np.zeros(_known(feature), feature.dtype) for name, feature in self._states.items()}

    def predict(
        self, inputs: dict[str, np.ndarray], state: dict[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """
        Args:
            inputs: an array for each of `inputs`.
            state: from `make_state`, for a program that has states. What the program writes replaces its arrays.

        Returns:
            An array for each of `outputs`.

        Raises:
            ValueError: a name, a shape or a dtype is not what the program declares, or an operation cannot be done
                on these values, such as a token id beyond the embedding.
        """
        inputs = _checked("input", inputs, self.inputs)
        state = {} if state is None and not self._states else state
        if state is None:
            raise ValueError(f"state=None, but the program keeps {sorted(self._states)}: pass state=make_state().")
        # A state is a cell, so that writing to it is seen by all that read it after.
        cells = {name: [_widened(value)] for name, value in _checked("state", state, self._states).items()}
        values = {**self._constants, **{name: _widened(value) for name, value in inputs.items()}, **cells}
        _run(self._steps, values)
        state.update({name: cell[0].astype(self._states[name].dtype) for name, cell in cells.items()})
        return {name: np.array(values[name], self.outputs[name].dtype) for name in self._results}


# Reading the file


def _load_spec(package: Path):
    """The parsed specification, and the folder that paths of weights are relative to."""
    if not (package / "Manifest.json").is_file():
        raise ValueError(
            f"{package} is not a .mlpackage, which is a folder with a Manifest.json. Pass the path of one."
        )
    manifest = json.loads((package / "Manifest.json").read_text())
    path = package / "Data" / manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    spec = _coremltools()[0].Model_pb2.Model()
    spec.ParseFromString(path.read_bytes())
    kind = spec.WhichOneof("Type")
    if kind != "mlProgram":
        raise ValueError(f'{package} holds a {kind}, not an ML program. Convert with convert_to="mlprogram".')
    return spec, path.parent


def _coremltools():
    try:
        from coremltools import proto
        from coremltools.libmilstoragepython import _BlobStorageReader
    except ImportError as error:
        raise ImportError(
            f'{error}; reading a Core ML package needs pip install "hf-encdec-distill[coreml]"'
        ) from error
    return proto, _BlobStorageReader


def _refuse_unknown(operations) -> None:
    unknown = [
        f"{each.type} (makes {', '.join(output.name for output in each.outputs) or 'nothing'})"
        for each in operations
        if each.type != "const" and each.type not in OPERATIONS
    ]
    if unknown:
        raise NotImplementedError(f"operations that this interpreter does not know: {'; '.join(unknown)}")


def _read_block(block, folder: Path) -> tuple[list[Step], dict[str, np.ndarray]]:
    """The operations to run, and the constants that they need: decoded, decompressed, widened."""
    readers: dict[Path, Any] = {}
    constants: dict[str, np.ndarray] = {}
    steps: list[Step] = []

    def keep(value) -> str:
        name = f"constant {len(constants)}"  # no name of the file has a space
        constants[name] = _read_value(value, folder, readers)
        return name

    for operation in block.operations:
        if operation.type == "const":
            constants[operation.outputs[0].name] = _read_value(operation.attributes["val"], folder, readers)
            continue
        arguments = {
            parameter: [each.name or keep(each.value) for each in argument.arguments]
            for parameter, argument in operation.inputs.items()
        }
        step = Step(operation.type, arguments, {each.name: _tensor(each.type).dtype for each in operation.outputs})
        if operation.type.startswith("constexpr_"):
            # What it decompresses is an attribute until iOS 17, an input since iOS 18.
            attributes = {name: value for name, value in operation.attributes.items() if name != "name"}
            arguments.update({parameter: [keep(value)] for parameter, value in attributes.items()})
            _run([step], constants)
        else:
            steps.append(step)
    needed = {name for step in steps for names in step.arguments.values() for name in names}.union(block.outputs)
    return steps, {name: value for name, value in constants.items() if name in needed}


def _read_value(value, folder: Path, readers: dict[Path, Any]) -> np.ndarray:
    """A `Value` of MIL.proto: in the specification itself or in a file of weights."""
    tensor = value.type.tensorType
    name, dtype, bits = _data_type(tensor.dataType)
    shape = _known(_tensor(value.type))
    if value.WhichOneof("value") == "blobFileValue":
        path = folder / value.blobFileValue.fileName.removeprefix("@model_path/")
        if not path.is_file():
            raise ValueError(f"{path}, which holds weights of the program, is missing: copy the whole package.")
        if path not in readers:
            readers[path] = _coremltools()[1](str(path))
        read = {"float16": "fp16", "float32": "float"}.get(name, name)
        array = np.asarray(getattr(readers[path], f"read_{read}_data")(value.blobFileValue.offset)).view(dtype)
    else:
        immediate = value.immediateValue.tensor
        field = immediate.WhichOneof("value")
        content = getattr(immediate, field).values
        if field != "bytes":
            array = np.array(list(content), dtype)
        elif bits < 8:
            array = _unpacked(np.frombuffer(content, np.uint8), bits, math.prod(shape)).astype(dtype)
            if dtype == np.int8:
                array[array >= 1 << (bits - 1)] -= 1 << bits
        else:
            array = np.frombuffer(content, dtype)
    # A constant of rank 0 is a scalar, which NumPy takes as an axis or a flag.
    return _widened(array.reshape(shape))[()]


def _unpacked(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`count` unsigned integers of `bits` each that follow one another in bytes, lowest bit first."""
    flat = np.unpackbits(data, bitorder="little")[: count * bits].reshape(count, bits)
    return (flat << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)


def _data_type(number: int) -> tuple[str, np.dtype, int]:
    """Name, dtype that holds it, and bits of a `DataType` of MIL.proto. Types below a byte are held in one."""
    name = _coremltools()[0].MIL_pb2.DataType.Name(number).lower()
    if name in ("bool", "string"):
        return name, np.dtype({"bool": np.bool_, "string": np.str_}[name]), 8
    found = re.match(r"(\D+)(\d+)", name)
    kind, bits = found.groups() if found else (name, "0")
    try:
        return name, np.dtype(f"{kind}{max(8, int(bits))}"), int(bits)
    except TypeError as error:
        raise NotImplementedError(f"values of type {name}, which NumPy does not have") from error


def _tensor(kind) -> Feature:
    """A `ValueType` of MIL.proto, that of a state being what it holds."""
    tensor = (kind.stateType.wrappedType if kind.HasField("stateType") else kind).tensorType
    shape = tuple(each.constant.size if each.HasField("constant") else None for each in tensor.dimensions)
    return Feature((shape,), _data_type(tensor.dataType)[1])


def _known(feature: Feature) -> tuple[int, ...]:
    """The shape of a constant or a state.

    Raises:
        ValueError: a size is open.
    """
    sizes = tuple(size for size in feature.shapes[0] if isinstance(size, int))
    if len(sizes) < len(feature.shapes[0]):
        raise ValueError(f"a constant or state of shape {_as_text(feature.shapes[0])}: all its sizes have to be known")
    return sizes


def _feature(description) -> Feature:
    """A `FeatureDescription` of Model.proto, which knows the bounds of a flexible shape."""
    kind = description.type.WhichOneof("Type")
    if kind != "multiArrayType":
        raise ValueError(f"input {description.name!r} is of {kind}; convert the model with tensors as its inputs.")
    array = description.type.multiArrayType
    name = array.ArrayDataType.Name(array.dataType)
    dtype = np.dtype("float64" if name == "DOUBLE" else name.lower())
    flexibility = array.WhichOneof("ShapeFlexibility")
    if flexibility == "enumeratedShapes":
        return Feature(tuple(tuple(each.shape) for each in array.enumeratedShapes.shapes), dtype)
    if flexibility == "shapeRange":
        sizes = [(each.lowerBound, each.upperBound) for each in array.shapeRange.sizeRanges]
        # An upper bound of -1 is none.
        ends = [2**31 if upper < 0 else upper + 1 for _, upper in sizes]
        shape = [lower if end == lower + 1 else range(lower, end) for (lower, _), end in zip(sizes, ends)]
        return Feature((tuple(shape),), dtype)
    return Feature((tuple(array.shape),), dtype)


# Running


def _checked(role: str, given: dict, features: dict[str, Feature]) -> dict[str, np.ndarray]:
    missing, unknown = sorted(features.keys() - given.keys()), sorted(given.keys() - features.keys())
    if missing or unknown:
        raise ValueError(f"{role}s: missing {missing}, unknown {unknown}. Pass exactly {sorted(features)}.")
    arrays = {name: np.asarray(value) for name, value in given.items()}
    for name, array in arrays.items():
        shapes, dtype = features[name]
        if array.dtype != dtype:
            raise ValueError(
                f"{role} {name!r} is {array.dtype}, the program takes {dtype}: pass .astype({str(dtype)!r})."
            )
        if not any(_fits(array.shape, shape) for shape in shapes):
            allowed = " or ".join(_as_text(shape) for shape in shapes)
            raise ValueError(
                f"{role} {name!r} has shape {array.shape}, the program takes {allowed}: pad or cut it, or convert "
                "the model with this shape."
            )
    return arrays


def _fits(shape: tuple[int, ...], allowed: tuple[int | range | None, ...]) -> bool:
    return len(shape) == len(allowed) and all(
        size in each if isinstance(each, range) else size == each for size, each in zip(shape, allowed)
    )


def _as_text(shape: tuple[int | range | None, ...]) -> str:
    return f"({', '.join(f'{e.start} to {e.stop - 1}' if isinstance(e, range) else str(e) for e in shape)})"


def _run(steps: list[Step], values: dict) -> None:
    """Run the steps in order; their results join `values`."""
    # Masks reach beyond fp16, and saturated activations beyond exp: both are meant.
    with np.errstate(all="ignore"):
        for step in steps:
            arguments = {
                parameter: [values[each] for each in names] if parameter == "values" else values[names[0]]
                for parameter, names in step.arguments.items()
            }
            try:
                results = OPERATIONS[step.type](**arguments)
            except (IndexError, TypeError, ValueError) as error:
                raise ValueError(f"{step.type} that makes {', '.join(step.outputs)}: {error}") from error
            results = results if isinstance(results, list) else [results]
            for (name, dtype), result in zip(step.outputs.items(), results, strict=True):
                values[name] = _widened(np.asarray(result).astype(dtype, copy=False))


def _widened(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array


# Operations. Parameters have the names of the file, and defaults where it may leave them out. A Python float keeps an
# array in fp32, a scalar of NumPy would not. The result is converted to the declared type by `_run`.


def _gather(x, indices, axis=0, batch_dims=0, validate_indices=None):
    _refuse_negative(indices, validate_indices)
    if batch_dims == 0:
        return np.take(x, indices, axis)
    inner = [_gather(*pair, axis % x.ndim - 1, batch_dims - 1) for pair in zip(x, indices, strict=True)]
    return np.stack(inner)


def _gather_along_axis(x, indices, axis=0, validate_indices=None):
    _refuse_negative(indices, validate_indices)
    return np.take_along_axis(x, indices, axis)


def _refuse_negative(indices, validate_indices) -> None:
    # The parameter came with iOS 17, and with it that what a negative index reads is not defined.
    if validate_indices is not None and np.any(np.less(indices, 0)):
        raise IndexError(f"index {np.min(indices)} is negative, which is out of bounds since iOS 17")


def _gelu(x, mode="EXACT"):
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * _sigmoid(1.702 * x)
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _erf(x):
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _softmax(x, axis=-1):
    exponentials = np.exp(x - np.max(x, axis, keepdims=True))
    return exponentials / np.sum(exponentials, axis, keepdims=True)


def _cumsum(x, axis=0, exclusive=False, reverse=False):
    x = np.flip(x, axis) if reverse else x
    total = np.cumsum(x, axis, dtype=x.dtype)
    total = total - x if exclusive else total
    return np.flip(total, axis) if reverse else total


def _reduce(function: Callable, x, axes=None, keep_dims=False):
    return function(x, axis=None if axes is None else tuple(axes), keepdims=bool(keep_dims))


def _avg_pool(
    x, kernel_sizes, strides=None, pad_type="valid", pad=0, exclude_padding_from_average=False, ceil_mode=False
):
    if np.any(pad) or ceil_mode:
        raise NotImplementedError("avg_pool with padding or ceil_mode")
    for axis, (size, stride) in enumerate(zip(kernel_sizes, strides, strict=True), start=2):
        first = range(0, x.shape[axis] - size + 1, stride)
        x = np.stack([x.take(range(i, i + size), axis).mean(axis) for i in first], axis)
    return x


def _conv(x, weight, bias=None, strides=None, pad_type="valid", pad=0, dilations=1, groups=1):
    if str(pad_type) not in ("valid", "custom") or np.any(pad) or np.any(np.not_equal(dilations, 1)) or groups != 1:
        raise NotImplementedError("conv with padding, dilations or groups")
    axes = tuple(range(2, x.ndim))
    places = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axes)
    if strides is not None:
        every = (slice(None), slice(None), *(slice(None, None, step) for step in strides))
        places = places[every]
    within = [axis + len(axes) for axis in axes]
    result = np.moveaxis(np.tensordot(places, weight, ([1, *within], [1, *axes])), -1, 1)
    return result if bias is None else result + bias.reshape(-1, *(1 for _ in axes))


def _pad(x, pad, mode="constant", constant_val=0.0):
    if str(mode) != "constant":
        raise NotImplementedError(f"pad with mode {mode}")
    sides = np.reshape(pad, (-1, 2))  # of the last axes
    return np.pad(x, [(0, 0)] * (x.ndim - len(sides)) + sides.tolist(), constant_values=constant_val)


def _layer_norm(x, axes=None, gamma=None, beta=None, epsilon=1e-5):
    axes = tuple(range(x.ndim) if axes is None else sorted(axis % x.ndim for axis in axes))
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    centred = x - np.mean(x, axes, keepdims=True)
    normed = centred / np.sqrt(np.mean(centred**2, axes, keepdims=True) + epsilon)
    normed = normed if gamma is None else normed * gamma.reshape(shape)
    return normed if beta is None else normed + beta.reshape(shape)


def _l2_norm(x, epsilon=1e-6):
    return x / np.sqrt(np.sum(x**2, axis=(-3, -2, -1), keepdims=True) + epsilon)


def _linear(x, weight, bias=0.0):
    return x @ weight.T + bias


def _matmul(x, y, transpose_x=False, transpose_y=False):
    x = x.swapaxes(-1, -2) if transpose_x and x.ndim > 1 else x
    y = y.swapaxes(-1, -2) if transpose_y and y.ndim > 1 else y
    return x @ y


def _attention(query, key, value, attn_mask=None):
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, -math.inf) if attn_mask.dtype == bool else scores + attn_mask
    return _softmax(scores) @ value


def _reshape(x, shape):
    # 0 is the size in the same place counted from the right, or 1 beyond the rank of x.
    same = [1] * len(shape) + list(x.shape)
    return x.reshape([int(size) or same[index - len(shape)] for index, size in enumerate(shape)])


def _squeeze(x, axes=None):
    # An axis that is not 1 wide stays, as in PyTorch.
    return np.squeeze(x, tuple(axis for axis in (range(x.ndim) if axes is None else axes) if x.shape[axis] == 1))


def _index(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None) -> tuple[int | slice, ...]:
    none = [False] * x.ndim
    return tuple(
        (0 if from_start else int(first))
        if one
        else slice(None if from_start else int(first), None if to_end else int(last), int(step))
        for first, last, step, from_start, to_end, one in zip(
            begin,
            end,
            [1] * x.ndim if stride is None else stride,
            none if begin_mask is None else begin_mask,
            none if end_mask is None else end_mask,
            none if squeeze_mask is None else squeeze_mask,
            strict=True,
        )
    )


def _slice_by_size(x, begin, size):
    starts = [int(first) % width if width else 0 for first, width in zip(begin, x.shape, strict=True)]
    return x[tuple(slice(start, None if count < 0 else start + count) for start, count in zip(starts, size))]


def _slice_update(x, update, **where):
    index, result = _index(x, **where), x.copy()
    result[index] = update.reshape(result[index].shape)
    return result


def _concat(values, axis, interleave=False):
    values = [np.atleast_1d(value) for value in values]
    if not interleave:
        return np.concatenate(values, axis)
    axis = axis % values[0].ndim
    shape = list(values[0].shape)
    shape[axis] *= len(values)
    return np.stack(values, axis + 1).reshape(shape)


def _split(x, axis, num_splits=None, split_sizes=None):
    return np.split(x, num_splits if split_sizes is None else np.cumsum(split_sizes)[:-1], axis)


def _band_part(x, lower=-1, upper=-1):
    below = np.arange(x.shape[-2])[:, None] - np.arange(x.shape[-1])
    return np.where(((lower < 0) | (below <= lower)) & ((upper < 0) | (-below <= upper)), x, 0)


def _one_hot(indices, one_hot_vector_size, axis=-1, on_value=1, off_value=0):
    indices = np.asarray(indices)
    place = axis % (indices.ndim + 1)
    hot = np.expand_dims(indices, -1) == np.arange(one_hot_vector_size)
    return np.moveaxis(np.where(hot, on_value, off_value), -1, place)


def _write_state(input, data):
    input[0] = data
    return []


def _affine_dequantize(quantized_data, zero_point, scale, axis):
    shape = [-1 if index == axis % quantized_data.ndim else 1 for index in range(quantized_data.ndim)]
    zero_point, scale = (np.reshape(each, shape if np.ndim(each) else ()) for each in (zero_point, scale))
    return (quantized_data.astype(np.float32) - zero_point) * scale


def _blockwise_shift_scale(data, scale, offset=None):
    blocks = _block_of_each(data.shape, scale.shape)
    data = data.astype(np.float32)
    return (data if offset is None else data - offset[blocks]) * scale[blocks]


def _lut_to_dense(indices, lut, shape=None, vector_axis=-1):
    if shape is not None:  # iOS 16: indices are packed, and one table serves all
        bits = (len(lut) - 1).bit_length()
        indices = _unpacked(indices, bits, math.prod(map(int, shape))).reshape(shape)
        lut = lut.reshape(*[1] * len(shape), -1, 1)
    axis = vector_axis % indices.ndim
    where = (*_block_of_each(indices.shape, lut.shape), indices)
    vectors = np.moveaxis(lut[where], -1, axis + 1)
    return vectors.reshape([size * lut.shape[-1] if i == axis else size for i, size in enumerate(indices.shape)])


def _block_of_each(shape, blocks) -> tuple[np.ndarray, ...]:
    """For every element of a tensor the index of its block, where each axis is cut into so many equal blocks."""
    return np.ix_(*(np.arange(size) // (size // count) for size, count in zip(shape, blocks)))


def _sparse_to_dense(nonzero_data, mask, shape=None):
    if shape is not None:  # iOS 16: the mask is packed
        mask = _unpacked(mask, 1, math.prod(map(int, shape))).reshape(shape)
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask == 1] = nonzero_data
    return dense


def _of_one(function: Callable) -> Callable:
    return lambda x: function(x)


def _of_two(function: np.ufunc) -> Callable:
    return lambda x, y: function(x, y)


OPERATIONS: dict[str, Callable] = {
    # elementwise, of one
    "abs": _of_one(np.abs),
    "cast": lambda x, dtype: x,
    "clip": lambda x, alpha, beta: np.minimum(np.maximum(x, alpha), beta),
    "cos": _of_one(np.cos),
    "erf": _erf,
    "exp": _of_one(np.exp),
    "exp2": _of_one(np.exp2),
    "floor": _of_one(np.floor),
    "gelu": _gelu,
    "identity": lambda x: x,
    "log": lambda x, epsilon=1e-45: np.log(x + epsilon),
    "logical_not": _of_one(np.logical_not),
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "round": _of_one(np.round),
    "rsqrt": lambda x, epsilon=1e-12: 1 / np.sqrt(x + epsilon),
    "sigmoid": _sigmoid,
    "sigmoid_hard": lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1),
    "sign": _of_one(np.sign),
    "silu": lambda x: x * _sigmoid(x),
    "sin": _of_one(np.sin),
    "softplus": lambda x: np.logaddexp(x, 0),
    "sqrt": _of_one(np.sqrt),
    "square": _of_one(np.square),
    "tanh": _of_one(np.tanh),
    # elementwise, of two or three
    "add": _of_two(np.add),
    "equal": _of_two(np.equal),
    "floor_div": _of_two(np.floor_divide),
    "greater": _of_two(np.greater),
    "greater_equal": _of_two(np.greater_equal),
    "less": _of_two(np.less),
    "less_equal": _of_two(np.less_equal),
    "logical_and": _of_two(np.logical_and),
    "logical_or": _of_two(np.logical_or),
    "maximum": _of_two(np.maximum),
    "minimum": _of_two(np.minimum),
    "mul": _of_two(np.multiply),
    "not_equal": _of_two(np.not_equal),
    "pow": _of_two(np.power),
    "real_div": _of_two(np.divide),
    "select": lambda cond, a, b: np.where(cond, a, b),
    "sub": _of_two(np.subtract),
    # along axes
    "avg_pool": _avg_pool,
    "conv": _conv,
    "cumsum": _cumsum,
    "l2_norm": _l2_norm,
    "layer_norm": _layer_norm,
    "reduce_max": partial(_reduce, np.max),
    "reduce_mean": partial(_reduce, np.mean),
    "reduce_min": partial(_reduce, np.min),
    "reduce_sum": partial(_reduce, np.sum),
    "softmax": _softmax,
    # products
    "einsum": lambda values, equation: np.einsum(str(equation), *values),
    "linear": _linear,
    "matmul": _matmul,
    "scaled_dot_product_attention": _attention,
    # shapes and places
    "band_part": _band_part,
    "concat": _concat,
    "expand_dims": lambda x, axes: np.expand_dims(x, tuple(axes)),
    "fill": lambda shape, value=0.0: np.full(shape, value),
    "fill_like": lambda ref_tensor, value=0.0: np.full(ref_tensor.shape, value),
    "gather": _gather,
    "gather_along_axis": _gather_along_axis,
    "one_hot": _one_hot,
    "pad": _pad,
    "range_1d": lambda start, end, step: np.arange(start, end, step),
    "reshape": _reshape,
    "shape": lambda x: np.array(x.shape),
    "slice_by_index": lambda x, **where: x[_index(x, **where)],
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
    "split": _split,
    "squeeze": _squeeze,
    "stack": lambda values, axis: np.stack(values, axis),
    "tile": lambda x, reps: np.tile(x, reps),
    "transpose": lambda x, perm: np.transpose(x, perm),
    # states: coreml_update_state is saved as a write and a read
    "read_state": lambda input: input[0],
    "write_state": _write_state,
    # compressed weights
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
    "constexpr_cast": lambda source_val, output_dtype: source_val,
    "constexpr_lut_to_dense": _lut_to_dense,
    "constexpr_sparse_to_dense": _sparse_to_dense,
}
