"""The interpreter of Core ML programs against torch, op by op and whole, and against coremltools' decompression."""

import functools
import shutil
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from toys import KINDS, make_model, ragged, random_ids

from hf_encdec_distill.export import mil_interpreter
from hf_encdec_distill.export.coreml import mended
from hf_encdec_distill.export.mil_interpreter import MilProgram
from hf_encdec_distill.export.modules import ExportedDecoder, ExportedEncoder


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types


IOS16, IOS18 = ct.target.iOS16, ct.target.iOS18
HALF, SINGLE = torch.float16, torch.float32
# Two units in the last place; sums of fp32 in another order are further apart.
TOLERANCES = {HALF: {"rtol": 2**-9, "atol": 2**-13}, SINGLE: {"rtol": 2e-6, "atol": 2e-6}}
MIL_TYPES = {HALF: types.fp16, SINGLE: types.fp32, torch.int32: types.int32, torch.bool: types.int32}


# Programs of one operation


def save_program(path, cases, dtype=SINGLE, opset=IOS18):
    """A package with the operations of all cases, and the inputs and the outputs of each by name."""
    tensors = [[x.to(dtype) if x.is_floating_point() else x for x in case[3]] for case in cases]
    named = [{f"in{n}_{i}": x for i, x in enumerate(inputs)} for n, inputs in enumerate(tensors)]
    specs = {
        name: mb.TensorSpec(tuple(x.shape), dtype=MIL_TYPES[x.dtype]) for inputs in named for name, x in inputs.items()
    }
    outputs = []
    with Function(specs, opset) as function:
        for inputs, (_, build, *_) in zip(named, cases):
            # Flags go in and out as integers.
            variables = [
                mb.cast(x=function.inputs[name], dtype="bool") if x.dtype == torch.bool else function.inputs[name]
                for name, x in inputs.items()
            ]
            results = build(*variables)
            results = results if isinstance(results, (list, tuple)) else [results]
            outputs.append([mb.cast(x=r, dtype="int32") if r.dtype == types.bool else r for r in results])
        function.set_outputs([each for results in outputs for each in results])
    program = Program()
    program.add_function("main", function)
    # Without passes, or what we want to run is optimized away.
    convert(program, path, minimum_deployment_target=opset, pass_pipeline=ct.PassPipeline.EMPTY)
    return named, [[each.name for each in results] for results in outputs]


def convert(model, path, **options):
    ct.convert(model, convert_to="mlprogram", skip_model_load=True, **options).save(str(path))


def operations(path):
    function = ct.utils.load_spec(str(path)).mlProgram.functions["main"]
    return [each.type for each in function.block_specializations[function.opset].operations]


def as_array(x):
    return x.to(torch.int32 if x.dtype in (torch.bool, torch.int64) else x.dtype).numpy()


def like(x, value):
    """A constant of the type of a MIL variable."""
    return np.asarray(value, types.nptype_from_builtin(x.dtype))


def draw(*shape):
    return torch.randn(*shape, generator=_generator)


_generator = torch.Generator().manual_seed(0)
X, Y, POSITIVE, ROW = draw(2, 3, 4), draw(2, 3, 4), draw(2, 3, 4).abs() + 0.1, draw(4)
MATRIX, SQUARE, TIES = draw(5, 4), draw(6, 6), torch.tensor([-2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 3.0])
INTEGERS, OTHERS = torch.tensor([[7, -7, 3], [0, -1, 5]]).int(), torch.tensor([[2, 2, -2], [4, 3, 5]]).int()
FLAGS, OTHER_FLAGS = torch.tensor([[True, False, True]]), torch.tensor([[True], [False]])
PICKS, ALONG = torch.tensor([[2, 0], [1, 1]]).int(), torch.tensor([[[2, 0, 1, 1]], [[0, 0, 2, 1]]]).int()
QUERY, KEY, VALUE = draw(2, 2, 3, 8), draw(2, 2, 5, 8), draw(2, 2, 5, 6)
BIAS, VISIBLE = draw(2, 1, 3, 5), torch.ones(3, 5).tril(2).bool()
PICTURES, KERNEL = draw(2, 3, 4, 6), draw(4, 3, 2, 3)
WEIGHTS, PALETTE = draw(4, 6).round(decimals=1), torch.tensor([0.5, -1.25, 3.0, 7.5])
INT4 = types.nptype_from_builtin(types.int4)
UINT = {bits: types.nptype_from_builtin(getattr(types, f"uint{bits}")) for bits in (1, 2, 3)}
CODES = torch.tensor([[0, 3, 1, 2, 2, 1], [1, 1, 0, 3, 2, 0], [3, 3, 2, 0, 0, 1], [2, 1, 0, 3, 1, 2]])
SPARSE = torch.where(WEIGHTS.abs() > 0.7, WEIGHTS, 0)


def packed(codes, bits):
    """Written out bit by bit, lowest first."""
    text = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    return np.array([int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8)], np.uint8)


def unary(op, reference, x=X):
    return op, lambda x: getattr(mb, op)(x=x), reference, [x]


def binary(op, reference, x=X, y=Y):
    return op, lambda x, y: getattr(mb, op)(x=x, y=y), reference, [x, y]


def reduction(op, reference):
    return [
        (op, lambda x: getattr(mb, op)(x=x, axes=[-1], keep_dims=True), lambda x: reference(x, (-1,), True), [X]),
        (op, lambda x: getattr(mb, op)(x=x, axes=[0, 2], keep_dims=False), lambda x: reference(x, (0, 2), False), [X]),
        (op, lambda x: getattr(mb, op)(x=x), lambda x: reference(x, (0, 1, 2), False), [X]),
    ]


def sliced(reference, begin, end, **masks):
    return "slice_by_index", lambda x: mb.slice_by_index(x=x, begin=begin, end=end, **masks), reference, [X]


def pooled(size, stride):
    def build(x):
        return mb.avg_pool(x=x, kernel_sizes=[size], strides=[stride], pad_type="valid")

    return "avg_pool", build, lambda x: F.avg_pool1d(x, size, stride), [X]


def convolved(stride, bias=None):
    def build(x):
        given = {} if bias is None else {"bias": like(x, bias)}
        return mb.conv(x=x, weight=like(x, KERNEL), strides=stride, pad_type="valid", **given)

    def reference(x):
        weight, of_channels = KERNEL.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return F.conv2d(x.float(), weight.float(), None if bias is None else of_channels.float(), stride).to(x.dtype)

    return "conv", build, reference, [PICTURES]


def padded(*sides):
    def build(x):
        around = [0] * (2 * x.rank - len(sides)) + [
            n for end in range(len(sides), 0, -2) for n in sides[end - 2 : end]
        ]
        return mb.pad(x=x, pad=around, mode="constant", constant_val=like(x, 0.5))

    return "pad", build, lambda x: F.pad(x, sides, value=0.5), [X]


def added(op, weight, expected, opset=IOS18):
    """A compressed weight, decompressed and added to zeros."""
    return op, lambda x: mb.add(x=x, y=weight(x)), lambda x: x + expected.to(x.dtype), [0 * expected], opset


CASES = [
    unary("abs", torch.abs),
    unary("abs", torch.abs, INTEGERS),
    ("cast", lambda x: mb.cast(x=x, dtype="int32"), lambda x: x.int(), [3 * X]),
    ("cast", lambda x: mb.cast(x=x, dtype="fp16"), lambda x: x.half(), [3 * X]),
    ("cast", lambda x: mb.cast(x=x, dtype="bool"), lambda x: x.bool(), [TIES]),
    ("clip", lambda x: mb.clip(x=x, alpha=like(x, -0.5), beta=like(x, 0.25)), lambda x: x.clamp(-0.5, 0.25), [X]),
    unary("cos", torch.cos),
    unary("erf", torch.erf),
    unary("exp", torch.exp),
    unary("exp2", torch.exp2),
    unary("floor", torch.floor, TIES),
    ("gelu", lambda x: mb.gelu(x=x, mode="EXACT"), F.gelu, [X]),
    ("gelu", lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), lambda x: F.gelu(x, approximate="tanh"), [X]),
    (
        "gelu",
        lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        lambda x: (x.float() * torch.sigmoid(1.702 * x.float())).to(x.dtype),
        [X],
    ),
    unary("identity", lambda x: x),
    unary("log", torch.log, POSITIVE),
    unary("logical_not", torch.logical_not, FLAGS),
    unary("relu", torch.relu),
    unary("relu6", F.relu6, 9 * X),
    unary("round", torch.round, TIES),
    unary("rsqrt", torch.rsqrt, POSITIVE),
    unary("sigmoid", torch.sigmoid, 20 * X),
    ("sigmoid_hard", lambda x: mb.sigmoid_hard(x=x, alpha=like(x, 1 / 6), beta=like(x, 0.5)), F.hardsigmoid, [3 * X]),
    unary("sign", torch.sign, TIES),
    unary("silu", F.silu, 20 * X),
    unary("sin", torch.sin),
    unary("softplus", F.softplus),
    unary("sqrt", torch.sqrt, POSITIVE),
    unary("square", torch.square),
    unary("tanh", torch.tanh),
    pooled(2, 2),
    pooled(3, 3),
    pooled(2, 1),
    convolved([2, 3], ROW),
    convolved([1, 1]),
    padded(0, 2),
    padded(1, 2, 0, 3),
    binary("add", torch.add),
    binary("add", torch.add, X, ROW),
    binary("add", torch.add, INTEGERS, OTHERS),
    binary("equal", torch.eq, INTEGERS, INTEGERS.abs()),
    binary("floor_div", torch.floor_divide),
    binary("floor_div", torch.floor_divide, INTEGERS, OTHERS),
    binary("greater", torch.gt),
    binary("greater_equal", torch.ge, INTEGERS, INTEGERS.abs()),
    binary("less", torch.lt),
    binary("less_equal", torch.le, INTEGERS, INTEGERS.abs()),
    binary("logical_and", torch.logical_and, FLAGS, OTHER_FLAGS),
    binary("logical_or", torch.logical_or, FLAGS, OTHER_FLAGS),
    binary("maximum", torch.maximum),
    binary("minimum", torch.minimum),
    binary("mul", torch.mul),
    binary("mul", torch.mul, 300 * X, 300 * Y),  # beyond fp16
    binary("not_equal", torch.ne, INTEGERS, INTEGERS.abs()),
    binary("pow", torch.pow, POSITIVE, Y),
    binary("real_div", torch.div),
    ("select", lambda c, a, b: mb.select(cond=c, a=a, b=b), torch.where, [X > 0, X, Y]),
    binary("sub", torch.sub),
    ("cumsum", lambda x: mb.cumsum(x=x, axis=1), lambda x: x.cumsum(1), [INTEGERS]),
    ("cumsum", lambda x: mb.cumsum(x=x, axis=-1), lambda x: x.float().cumsum(-1).to(x.dtype), [X]),
    ("cumsum", lambda x: mb.cumsum(x=x, axis=1, exclusive=True), lambda x: (x.cumsum(1) - x).int(), [INTEGERS]),
    ("cumsum", lambda x: mb.cumsum(x=x, axis=1, reverse=True), lambda x: x.flip(1).cumsum(1).flip(1).int(), [OTHERS]),
    ("l2_norm", lambda x: mb.l2_norm(x=x, epsilon=like(x, 1e-3)), lambda x: x / (x**2).sum().add(1e-3).sqrt(), [X]),
    (
        "layer_norm",
        lambda x: mb.layer_norm(x=x, axes=[-1], gamma=like(x, ROW), beta=like(x, 2 * ROW), epsilon=like(x, 1e-3)),
        lambda x: F.layer_norm(x, (4,), ROW.to(x.dtype), 2 * ROW.to(x.dtype), 1e-3),
        [X],
    ),
    ("layer_norm", lambda x: mb.layer_norm(x=x, axes=[1, 2]), lambda x: F.layer_norm(x, (3, 4)), [X]),
    *reduction("reduce_max", torch.amax),
    *reduction("reduce_mean", torch.mean),
    *reduction("reduce_min", torch.amin),
    *reduction("reduce_sum", torch.sum),
    ("softmax", lambda x: mb.softmax(x=x), lambda x: x.softmax(-1), [9 * X]),
    ("softmax", lambda x: mb.softmax(x=x, axis=1), lambda x: x.softmax(1), [X - 3e4]),
    (
        "einsum",
        lambda a, b: mb.einsum(values=(a, b), equation="nchw,nwhu->nchu"),
        lambda a, b: torch.einsum("nchw,nwhu->nchu", a.float(), b.float()).to(a.dtype),
        [QUERY, draw(2, 8, 3, 4)],
    ),
    (
        "linear",
        lambda x: mb.linear(x=x, weight=like(x, MATRIX), bias=like(x, MATRIX[:, 0])),
        lambda x: F.linear(x, MATRIX.to(x.dtype), MATRIX[:, 0].to(x.dtype)),
        [X],
    ),
    ("linear", lambda x: mb.linear(x=x, weight=like(x, MATRIX)), lambda x: x @ MATRIX.to(x.dtype).T, [X]),
    ("matmul", lambda x, y: mb.matmul(x=x, y=y, transpose_y=True), lambda x, y: x @ y.mT, [QUERY, KEY]),
    ("matmul", lambda x, y: mb.matmul(x=x, y=y, transpose_x=True), lambda x, y: x.mT @ y, [KEY, VALUE]),
    ("matmul", lambda x, y: mb.matmul(x=x, y=y, transpose_y=True), lambda x, y: x @ y.T, [ROW, MATRIX]),
    (
        "scaled_dot_product_attention",
        lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
        F.scaled_dot_product_attention,
        [QUERY, KEY, VALUE],
    ),
    *(
        (
            "scaled_dot_product_attention",
            lambda q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m),
            F.scaled_dot_product_attention,
            [QUERY, KEY, VALUE, mask],
        )
        for mask in (BIAS, VISIBLE)
    ),
    ("band_part", lambda x: mb.band_part(x=x, lower=-1, upper=0), torch.tril, [SQUARE]),
    ("band_part", lambda x: mb.band_part(x=x, lower=2, upper=1), lambda x: x.tril(1).triu(-2), [draw(2, 5, 3)]),
    ("concat", lambda x, y: mb.concat(values=(x, y), axis=-2), lambda x, y: torch.cat((x, y), -2), [X, draw(2, 1, 4)]),
    ("concat", lambda x: mb.concat(values=(x,), axis=0), lambda x: x, [X]),
    (
        "concat",
        lambda x, y: mb.concat(values=(x, y), axis=1, interleave=True),
        lambda x, y: torch.stack((x, y), 2).reshape(2, 6, 4),
        [X, Y],
    ),
    (
        "concat",
        lambda x: mb.concat(values=[mb.squeeze(x=each) for each in mb.split(x=x, num_splits=3, axis=0)], axis=0),
        lambda x: x,
        [torch.tensor([3, 1, 2]).int()],
    ),
    ("expand_dims", lambda x: mb.expand_dims(x=x, axes=[0, -1]), lambda x: x[None, ..., None], [X]),
    ("fill", lambda x: mb.fill(shape=mb.shape(x=x), value=like(x, 2.5)), lambda x: torch.full_like(x, 2.5), [X]),
    ("fill_like", lambda x: mb.fill_like(ref_tensor=x, value=like(x, 2.5)), lambda x: torch.full_like(x, 2.5), [X]),
    ("gather", lambda x, i: mb.gather(x=x, indices=i, axis=1), lambda x, i: x[:, i], [X, PICKS]),
    ("gather", lambda x, i: mb.gather(x=x, indices=i, axis=-1), lambda x, i: x[..., i], [X, PICKS], IOS16),
    ("gather", lambda x: mb.gather(x=x, indices=2, axis=1), lambda x: x[:, 2], [X]),
    (
        "gather",
        lambda x, i: mb.gather(x=x, indices=i, axis=-2, batch_dims=1),
        lambda x, i: torch.stack([x[b, i[b]] for b in range(2)]),
        [X, PICKS],
    ),
    (
        "gather_along_axis",
        lambda x, i: mb.gather_along_axis(x=x, indices=i, axis=1),
        lambda x, i: x.gather(1, i.long()),
        [X, ALONG],
    ),
    (
        "one_hot",
        lambda i: mb.one_hot(indices=i, one_hot_vector_size=3, on_value=1, off_value=0),
        lambda i: F.one_hot(i.long(), 3).int(),
        [PICKS],
    ),
    (
        "one_hot",
        lambda i: mb.one_hot(indices=i, one_hot_vector_size=3, axis=1, on_value=2.0, off_value=-1.0),
        lambda i: (3 * F.one_hot(i.long(), 3) - 1).mT.float(),
        [PICKS],
    ),
    (
        "range_1d",
        lambda x: mb.range_1d(start=2, end=mb.squeeze(x=x), step=3),
        lambda x: torch.arange(2, int(x), 3).int(),
        [torch.tensor([12]).int()],
    ),
    ("reshape", lambda x: mb.reshape(x=x, shape=[3, -1]), lambda x: x.reshape(3, -1), [X]),
    ("reshape", lambda x: mb.reshape(x=x, shape=[1, 0, -1, 0]), lambda x: x.reshape(1, 2, 3, 4), [X]),
    ("reshape", lambda x: mb.reshape(x=x, shape=[0, -1, 2]), lambda x: x.reshape(2, 6, 2), [X], IOS16),
    unary("shape", lambda x: torch.tensor(x.shape).int()),
    sliced(lambda x: x[1:2, 0:3, 1:4:2], [1, 0, 1], [2, 3, 4], stride=[1, 1, 2]),
    sliced(
        lambda x: x[:, -2:, :-1], [5, -2, 5], [5, 5, -1], begin_mask=[True, False, True], end_mask=[True] * 2 + [False]
    ),
    sliced(lambda x: x[1, :, -1], [1, 0, -1], [2, 3, 0], squeeze_mask=[True, False, True]),
    sliced(lambda x: x.flip(2), [0, 0, 0], [2, 3, 4], stride=[1, 1, -1], begin_mask=[True] * 3, end_mask=[True] * 3),
    (
        "slice_by_size",
        lambda x: mb.slice_by_size(x=x, begin=[0, 1, -2], size=[1, 2, -1]),
        lambda x: x[:1, 1:, -2:],
        [X],
    ),
    (
        "slice_update",
        lambda x, y: mb.slice_update(x=x, update=y, begin=[0, 1, 0], end=[2, 2, 4]),
        lambda x, y: torch.cat((x[:, :1], y, x[:, 2:]), 1),
        [X, draw(2, 1, 4)],
    ),
    (
        "slice_update",
        lambda x, y: mb.slice_update(x=x, update=y, begin=[0, 1, 0], end=[2, 2, 4], squeeze_mask=[False, True, False]),
        lambda x, y: torch.stack((x[:, 0], y, x[:, 2]), 1),
        [X, draw(2, 4)],
    ),
    ("split", lambda x: mb.split(x=x, num_splits=2, axis=-1), lambda x: x.split(2, -1), [X]),
    ("split", lambda x: mb.split(x=x, split_sizes=[1, 3], axis=2), lambda x: x.split([1, 3], 2), [X]),
    ("squeeze", lambda x: mb.squeeze(x=x, axes=[0, 1]), lambda x: x.squeeze(0), [draw(1, 3, 1)], IOS16),
    unary("squeeze", torch.squeeze, draw(1, 3, 1)),
    ("stack", lambda x, y: mb.stack(values=(x, y), axis=-1), lambda x, y: torch.stack((x, y), -1), [X, Y]),
    ("tile", lambda x: mb.tile(x=x, reps=[1, 3, 2]), lambda x: x.repeat(1, 3, 2), [X]),
    ("transpose", lambda x: mb.transpose(x=x, perm=[2, 0, -2]), lambda x: x.permute(2, 0, 1), [X]),
    *(
        added(
            "constexpr_affine_dequantize",
            lambda x, axis=axis, scale=scale, zero=zero: mb.constexpr_affine_dequantize(
                quantized_data=np.int8(10 * WEIGHTS), zero_point=np.int8(zero), scale=like(x, scale), axis=axis - 2
            ),
            ((10 * WEIGHTS).int() - zero.unsqueeze(1 - axis)) * scale.unsqueeze(1 - axis),
            IOS16,
        )
        for axis, scale, zero in (
            (0, 2.0 ** -torch.arange(4), torch.tensor([-100, 3, 100, 7])),
            (1, 2.0 ** -torch.arange(6), torch.arange(6)),
        )
    ),
    added(
        "constexpr_cast",
        lambda x: mb.cast(
            x=mb.constexpr_cast(source_val=np.float16(WEIGHTS), output_dtype="fp32"),
            dtype={types.fp16: "fp16", types.fp32: "fp32"}[x.dtype],
        ),
        WEIGHTS.half(),
        IOS16,
    ),
    added(
        "constexpr_lut_to_dense",
        lambda x: mb.constexpr_lut_to_dense(
            indices=packed(CODES.flatten().tolist(), 2), lut=like(x, PALETTE), shape=np.uint32(CODES.shape)
        ),
        PALETTE[CODES],
        IOS16,
    ),
    added(
        "constexpr_lut_to_dense",  # two tables for the first and the last two rows
        lambda x: mb.constexpr_lut_to_dense(
            indices=CODES.numpy().astype(UINT[2]),
            lut=like(x, torch.stack((PALETTE, -PALETTE)).reshape(2, 1, 4, 1)),
        ),
        torch.cat((PALETTE[CODES[:2]], -PALETTE[CODES[2:]])),
    ),
    added(
        "constexpr_lut_to_dense",  # a code of three bits stands for two numbers, one below the other
        lambda x: mb.constexpr_lut_to_dense(
            indices=(CODES + 4).numpy().astype(UINT[3]),
            lut=like(x, torch.arange(16.0).reshape(1, 1, 8, 2)),
            vector_axis=np.int32(0),
        ),
        torch.stack((2.0 * (CODES + 4), 2.0 * (CODES + 4) + 1), 1).reshape(8, 6),
    ),
    added(
        "constexpr_sparse_to_dense",
        lambda x: mb.constexpr_sparse_to_dense(
            nonzero_data=like(x, SPARSE[SPARSE != 0]),
            mask=packed((SPARSE != 0).int().flatten().tolist(), 1),
            shape=np.uint32(SPARSE.shape),
        ),
        SPARSE,
        IOS16,
    ),
    added(
        "constexpr_sparse_to_dense",
        lambda x: mb.constexpr_sparse_to_dense(
            nonzero_data=like(x, SPARSE[SPARSE != 0]), mask=(SPARSE != 0).numpy().astype(UINT[1])
        ),
        SPARSE,
    ),
    *(
        added(
            "constexpr_blockwise_shift_scale",
            lambda x, kind=kind, offset=offset: mb.constexpr_blockwise_shift_scale(
                data=(CODES * 5 - 8).numpy().astype(kind),
                scale=like(x, [[0.5, 0.25, 2.0], [1.0, 8.0, 4.0]]),
                **({} if offset is None else {"offset": np.full((2, 3), offset).astype(kind)}),
            ),
            torch.tensor([[0.5, 0.25, 2.0], [1.0, 8.0, 4.0]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
            * (CODES * 5 - 8 - (offset or 0)),
        )
        for kind, offset in ((np.int8, None), (np.int8, -100), (INT4, None), (INT4, -3))
    ),
    added(
        "constexpr_blockwise_shift_scale",  # small enough to stand in the specification, where two share a byte
        lambda x: mb.constexpr_blockwise_shift_scale(
            data=np.array([[-8, 7, 3]]).astype(INT4), scale=like(x, [[0.5]]), offset=np.array([[-2]]).astype(INT4)
        ),
        torch.tensor([[-3.0, 4.5, 2.5]]),
    ),
]


GROUPS = {
    f"{opset.name}, {name}": ([case for case in CASES if (case[4:] or (IOS18,))[0] == opset], dtype, opset)
    for opset in (IOS16, IOS18)
    for name, dtype in (("fp32", SINGLE), ("fp16", HALF))
}


@pytest.fixture(scope="module")
def run_group(tmp_path_factory):
    """The operations of a group in one program, since a conversion takes longer than all that it holds."""

    @functools.cache
    def run(group):
        cases, dtype, opset = GROUPS[group]
        path = tmp_path_factory.mktemp("operations") / "program.mlpackage"
        inputs, outputs = save_program(path, cases, dtype, opset)
        assert Counter(operations(path)) >= Counter(op for op, *_ in cases)
        arrays = MilProgram(path).predict({name: as_array(x) for each in inputs for name, x in each.items()})
        return [(list(given.values()), [arrays[name] for name in names]) for given, names in zip(inputs, outputs)]

    return run


@pytest.mark.parametrize(
    "group,number",
    [
        pytest.param(group, number, id=f"{case[0]} {number}, {group}")
        for group, (cases, *_) in GROUPS.items()
        for number, case in enumerate(cases)
    ],
)
def test_operation_is_that_of_torch(group, number, run_group):
    cases, dtype, _ = GROUPS[group]
    inputs, results = run_group(group)[number]
    expected = cases[number][2](*inputs)
    expected = expected if isinstance(expected, (list, tuple)) else [expected]
    for result, wanted in zip(results, expected, strict=True):
        wanted = torch.from_numpy(as_array(wanted))
        torch.testing.assert_close(torch.from_numpy(result), wanted, **TOLERANCES[dtype], equal_nan=True)


def test_every_operation_is_tested():
    states = {"read_state", "write_state"}  # in test_state_is_kept_from_call_to_call
    assert {op for op, *_ in CASES} | states == mil_interpreter.OPERATIONS.keys()


# States


def test_state_is_kept_from_call_to_call(tmp_path):
    path = tmp_path / "program.mlpackage"
    specs = {"x": mb.TensorSpec((2, 3), dtype=types.fp16), "total": mb.StateTensorSpec((2, 3), dtype=types.fp16)}
    with Function(specs, IOS18) as function:
        before = mb.read_state(input=function.inputs["total"], name="before")
        total = mb.add(x=before, y=function.inputs["x"])
        after = mb.coreml_update_state(state=function.inputs["total"], value=total, name="after")
        function.set_outputs([before, after])
    program = Program()
    program.add_function("main", function)
    convert(program, path, minimum_deployment_target=IOS18, pass_pipeline=ct.PassPipeline.EMPTY)
    assert {"read_state", "write_state"} <= set(operations(path))

    program = MilProgram(path)
    state, other = program.make_state(), program.make_state()
    assert list(state) == ["total"] and state["total"].dtype == np.float16
    first, second = np.float16(draw(2, 3)), np.float16(draw(2, 3))
    result = program.predict({"x": first}, state)
    assert not result["before"].any() and np.array_equal(result["after"], first)
    result["after"][:] = 7  # what the caller does with a result is no business of the state
    result = program.predict({"x": second}, state=state)
    assert np.array_equal(result["before"], first) and np.array_equal(result["after"], first + second)
    assert np.array_equal(state["total"], first + second) and not other["total"].any()

    with pytest.raises(ValueError, match=r"state=None.*total.*make_state"):
        program.predict({"x": first})
    with pytest.raises(ValueError, match=r"states: missing \['total'\], unknown \['sum'\]"):
        program.predict({"x": first}, {"sum": first})
    with pytest.raises(ValueError, match="state 'total' is float32.*float16"):
        program.predict({"x": first}, {"total": np.float32(first)})


# Whole programs: our two modules


PRECISIONS = {"fp32": ct.precision.FLOAT32, "fp16": ct.precision.FLOAT16}
# Logits and keys of the toys reach 5, where a unit in the last place of fp16 is 0.004.
ERRORS = {"fp32": 1e-5, "fp16": 0.02}
LENGTH, SLOTS = 7, 6


class WithState(torch.nn.Module):
    """The decoder with its own keys and values in two states, and the prompt's in two tensors."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder
        config = decoder.config
        shape = (config.decoder_num_hidden_layers, 1, config.num_key_value_heads, SLOTS, config.head_dim)
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def forward(self, ids, mask, position, cross_keys, cross_values):
        own = [each for pair in zip(self.keys, self.values) for each in pair]
        cross = [each for pair in zip(cross_keys, cross_values) for each in pair]
        logits, *own = self.decoder(ids, mask, position, *own, *cross)
        self.keys[:], self.values[:] = torch.stack(own[0::2]), torch.stack(own[1::2])
        return logits


def trace(module, names, inputs, path, shapes=None, floats=np.float32, **options):
    """Convert with a fixed shape for each input that `shapes` does not name."""
    inputs = [x.int() if x.dtype == torch.int64 else x for x in inputs]
    with torch.no_grad(), warnings.catch_warnings(), mended():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module.eval(), tuple(inputs), check_trace=False)
        convert(
            traced,
            path,
            inputs=[
                ct.TensorType(
                    name, (shapes or {}).get(name, tuple(x.shape)), floats if x.is_floating_point() else np.int32
                )
                for name, x in zip(names, inputs)
            ],
            **options,
        )


def run(program, tensors, state=None):
    inputs = {name: as_array(x).astype(program.inputs[name].dtype) for name, x in zip(program.inputs, tensors)}
    return [torch.from_numpy(x).float() for x in program.predict(inputs, state).values()]


def close(results, expected, precision):
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=ERRORS[precision])


def toy(kind):
    torch.manual_seed(0)
    return make_model(kind, encoder_num_hidden_layers=2, decoder_num_hidden_layers=1)


WHOLE = [
    ("separate", IOS18, "fp32"),
    ("separate", IOS18, "fp16"),
    ("merged", IOS16, "fp32"),
    ("merged", IOS16, "fp16"),
]


@pytest.fixture(scope="module")
def encoder_package(tmp_path_factory):
    """Path of an encoder's package, the prompts it was converted with, and what torch makes of them."""

    @functools.cache
    def make(kind="separate", opset=IOS18, precision="fp16"):
        encoder, path = ExportedEncoder(toy(kind)), tmp_path_factory.mktemp("encoder") / "encoder.mlpackage"
        inputs = ragged("left")[:2]
        options = {"minimum_deployment_target": opset, "compute_precision": PRECISIONS[precision]}
        trace(encoder, ["ids", "mask"], inputs, path, **options)
        with torch.no_grad():
            return path, inputs, encoder(*inputs)

    return make


@pytest.mark.parametrize("kind,opset,precision", WHOLE)
def test_encoder(kind, opset, precision, encoder_package):
    path, inputs, expected = encoder_package(kind, opset, precision)
    program = MilProgram(path)
    assert program.inputs["ids"] == (((3, LENGTH),), np.int32)
    assert [each.shapes for each in program.outputs.values()] == [(tuple(x.shape),) for x in expected]
    close(run(program, inputs), expected, precision)


@pytest.mark.parametrize("kind,opset,precision", WHOLE)
@torch.no_grad()
def test_decoder(kind, opset, precision, tmp_path):
    model = toy(kind)
    decoder, path = ExportedDecoder(model, fixed=True), tmp_path / "decoder.mlpackage"
    ids, mask, _ = ragged("left")
    cross = ExportedEncoder(model)(ids, mask)
    own = [draw(len(ids), *each.shape[1:2], SLOTS, each.shape[-1]) for each in cross]
    inputs = [random_ids(len(ids), 1), mask, torch.tensor([2]), *own, *cross]
    names = ["ids", "mask", "position", "key", "value", "cross_key", "cross_value"]
    options = {"minimum_deployment_target": opset, "compute_precision": PRECISIONS[precision]}
    trace(decoder, names, inputs, path, **options)
    close(run(MilProgram(path), inputs), decoder(*inputs), precision)


def sizes(kind, *shape):
    """-1 in a shape for lengths from 1 to 12, or one of two."""
    if kind == "range":
        return [ct.RangeDim(1, 12, default=LENGTH) if size == -1 else size for size in shape]
    return ct.EnumeratedShapes([[n if size == -1 else size for size in shape] for n in (LENGTH, 11)])


@pytest.mark.parametrize(
    "kind,flexible,precision", [("separate", "range", "fp16"), ("merged", "enumerated", "fp32")], ids=KINDS
)
@torch.no_grad()
def test_decoding_with_states_and_flexible_prompts(kind, flexible, precision, tmp_path):
    model = toy(kind)
    config, module = model.config, ExportedDecoder(model, fixed=True)
    prompt = torch.ones(1, LENGTH, dtype=torch.long)
    cross = ExportedEncoder(model)(prompt, prompt)
    inputs = [prompt[:, :1], prompt, torch.tensor([0]), torch.stack(cross[0::2]), torch.stack(cross[1::2])]
    shape = sizes(flexible, *inputs[-1].shape[:3], -1, config.head_dim)
    again = sizes(flexible, *inputs[-1].shape[:3], -1, config.head_dim)
    floats = {"fp16": np.float16, "fp32": np.float32}[precision]
    path = tmp_path / "decoder.mlpackage"
    trace(
        WithState(module),
        ["ids", "mask", "position", "cross_keys", "cross_values"],
        inputs,
        path,
        {"mask": sizes(flexible, 1, -1), "cross_keys": shape, "cross_values": again},
        floats,
        states=[
            ct.StateType(ct.TensorType(shape=tuple(buffer.shape), dtype=np.float16), name=name)
            for name, buffer in WithState(module).named_buffers(recurse=False)
        ],
        outputs=[ct.TensorType("logits", dtype=floats)],
        minimum_deployment_target=IOS18,
        compute_precision=PRECISIONS[precision],
    )
    program = MilProgram(path)
    assert program.inputs["mask"].shapes == (((1, range(1, 13)),) if flexible == "range" else ((1, LENGTH), (1, 11)))
    assert program.inputs["cross_keys"].dtype == floats
    for length in (LENGTH, 11):
        ids, state = random_ids(1, length), program.make_state()
        mask = torch.ones_like(ids)
        mask[:, -2:] = 0
        cross = ExportedEncoder(model)(ids, mask)
        target = random_ids(1, SLOTS)
        expected = model(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
        for step in range(SLOTS):
            inputs = [
                target[:, step : step + 1],
                mask,
                torch.tensor([step]),
                torch.stack(cross[0::2]),
                torch.stack(cross[1::2]),
            ]
            # States are fp16 in either precision.
            close(run(program, inputs, state), [expected[:, step : step + 1]], "fp16")
    with pytest.raises(ValueError, match=r"'mask' has shape \(1, 13\).*(\(1, 1 to 12\)|\(1, 7\) or \(1, 11\)).*pad"):
        inputs[1] = torch.ones(1, 13).int()
        run(program, inputs, state)


# Compressed weights, against coremltools' own decompression


def compressed(model, how):
    from coremltools.optimize import coreml as cto

    name, config = {
        "int8 per channel": ("linear_quantize_weights", cto.OpLinearQuantizerConfig(weight_threshold=0)),
        "int8 with zero points": (
            "linear_quantize_weights",
            cto.OpLinearQuantizerConfig(mode="linear", weight_threshold=0),
        ),
        "int4 per block": (
            "linear_quantize_weights",
            cto.OpLinearQuantizerConfig(dtype="int4", granularity="per_block", block_size=16, weight_threshold=0),
        ),
        "4 bits, uniform": ("palettize_weights", cto.OpPalettizerConfig(mode="uniform", nbits=4, weight_threshold=0)),
        "4 bits, k-means of groups": (
            "palettize_weights",
            cto.OpPalettizerConfig(nbits=4, granularity="per_grouped_channel", group_size=8, weight_threshold=0),
        ),
        "3 bits, k-means": ("palettize_weights", cto.OpPalettizerConfig(nbits=3, weight_threshold=0)),
        "half of them zero": ("prune_weights", cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=0)),
    }[how]
    return getattr(cto, name)(model, cto.OptimizationConfig(config)), cto.decompress_weights


@pytest.mark.parametrize(
    "how,opset,op",
    [
        ("int8 per channel", IOS18, "constexpr_blockwise_shift_scale"),
        ("int8 per channel", IOS16, "constexpr_affine_dequantize"),
        ("int8 with zero points", IOS18, "constexpr_blockwise_shift_scale"),
        ("int4 per block", IOS18, "constexpr_blockwise_shift_scale"),
        ("4 bits, uniform", IOS16, "constexpr_lut_to_dense"),
        ("4 bits, k-means of groups", IOS18, "constexpr_lut_to_dense"),
        ("3 bits, k-means", IOS18, "constexpr_lut_to_dense"),
        ("half of them zero", IOS18, "constexpr_sparse_to_dense"),
        ("half of them zero", IOS16, "constexpr_sparse_to_dense"),
    ],
)
def test_compressed_weights_are_those_that_coremltools_decompresses(how, opset, op, tmp_path):
    weights = [each.detach() for each in toy("separate").parameters() if each.dim() == 2]
    case = (
        "a lookup and two products",
        lambda ids: [
            mb.gather(x=np.float16(weights[0][:96]), indices=ids, axis=0),
            *(mb.linear(x=mb.cast(x=ids, dtype="fp16"), weight=np.float16(each)) for each in weights[1:3]),
        ],
        None,
        [torch.arange(32).int()],
    )
    save_program(tmp_path / "exact.mlpackage", [case], opset=opset)
    small, decompress = compressed(ct.models.MLModel(str(tmp_path / "exact.mlpackage"), skip_model_load=True), how)
    small.save(str(tmp_path / "small.mlpackage"))
    decompress(small).save(str(tmp_path / "large.mlpackage"))
    assert operations(tmp_path / "small.mlpackage").count(op) == 3
    assert op not in operations(tmp_path / "large.mlpackage")
    exact, small, large = (
        run(MilProgram(tmp_path / f"{name}.mlpackage"), case[3]) for name in ("exact", "small", "large")
    )
    for before, result, expected in zip(exact, small, large, strict=True):
        assert torch.equal(result, expected) and not torch.equal(result, before)


# What is wrong is said


def edited(path, copy, edit):
    """A copy of a package with another specification."""
    shutil.copytree(path, copy)
    spec = ct.utils.load_spec(str(path))
    edit(spec)
    (copy / "Data" / "com.apple.CoreML" / "model.mlmodel").write_bytes(spec.SerializeToString())
    return copy


def block_of(spec):
    function = spec.mlProgram.functions["main"]
    return function.block_specializations[function.opset]


def test_unknown_operations_are_named_at_load(encoder_package, tmp_path):
    def edit(spec):
        first, second = [each for each in block_of(spec).operations if each.type == "silu"][:2]
        first.type, second.type, first.outputs[0].name = "swish_of_tomorrow", "another", "gate"

    path = edited(encoder_package()[0], tmp_path / "program.mlpackage", edit)
    with pytest.raises(NotImplementedError, match=r"swish_of_tomorrow \(makes gate\); another \(makes "):
        MilProgram(path)


@pytest.mark.parametrize("op,other", [("silu", "sigmoid"), ("mul", "add"), ("rsqrt", "sqrt")])
def test_a_wrong_operation_shows(op, other, encoder_package, monkeypatch):
    path, inputs, expected = encoder_package()
    assert op in operations(path)
    monkeypatch.setitem(mil_interpreter.OPERATIONS, op, mil_interpreter.OPERATIONS[other])
    with pytest.raises((AssertionError, ValueError)):
        close(run(MilProgram(path), inputs), expected, "fp16")


def test_one_weight_shows(encoder_package, tmp_path):
    path, inputs, expected = encoder_package()
    weights = [each for each in block_of(ct.utils.load_spec(str(path))).operations if "weight" in each.outputs[0].name]
    copy = shutil.copytree(path, tmp_path / "program.mlpackage")
    blob = copy / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    content = bytearray(blob.read_bytes())
    record = weights[-1].attributes["val"].blobFileValue.offset
    start = int.from_bytes(content[record + 16 : record + 24], "little")
    content[start : start + 2] = np.float16(9).tobytes()
    blob.write_bytes(content)
    with pytest.raises(AssertionError):
        close(run(MilProgram(copy), inputs), expected, "fp16")
    blob.unlink()
    with pytest.raises(ValueError, match="weight.bin.*missing"):
        MilProgram(copy)


def test_what_is_not_a_program(encoder_package, tmp_path, monkeypatch):
    path = encoder_package()[0]
    with pytest.raises(ValueError, match="nowhere is not a .mlpackage"):
        MilProgram(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"function='encode'.*\['main'\]"):
        MilProgram(path, function="encode")
    copy = edited(path, tmp_path / "network.mlpackage", lambda spec: spec.neuralNetwork.layers.add())
    with pytest.raises(ValueError, match='holds a neuralNetwork, not an ML program.*convert_to="mlprogram"'):
        MilProgram(copy)
    copy = edited(
        path, tmp_path / "image.mlpackage", lambda spec: spec.description.input[1].type.imageType.SetInParent()
    )
    with pytest.raises(ValueError, match="input 'mask' is of imageType.*tensors"):
        MilProgram(copy)
    monkeypatch.setitem(sys.modules, "coremltools.libmilstoragepython", None)
    with pytest.raises(ImportError, match=r'pip install "hf-encdec-distill\[coreml\]"'):
        MilProgram(path)


def test_functions_of_one_package(encoder_package, tmp_path):
    functions = ct.utils.MultiFunctionDescriptor()
    for kind, opset in (("separate", IOS18), ("merged", IOS16)):
        functions.add_function(str(encoder_package(kind, opset)[0]), "main", kind)
    functions.default_function_name = "separate"
    ct.utils.save_multifunction(functions, str(tmp_path / "both.mlpackage"))
    for kind, opset in (("separate", IOS18), ("merged", IOS16)):
        _, inputs, expected = encoder_package(kind, opset)
        close(run(MilProgram(tmp_path / "both.mlpackage", function=kind), inputs), expected, "fp16")


def test_inputs_are_checked(encoder_package):
    path, (ids, mask), _ = encoder_package()
    program, ids, mask = MilProgram(path), as_array(ids), as_array(mask)
    for inputs, message in (
        ({"ids": ids}, r"inputs: missing \['mask'\], unknown \[\]. Pass exactly \['ids', 'mask'\]"),
        ({"ids": ids, "mask": mask, "position": ids}, r"unknown \['position'\]"),
        (
            {"ids": ids.astype(np.int64), "mask": mask},
            r"'ids' is int64, the program takes int32: pass .astype\('int32'",
        ),
        ({"ids": ids[:, 1:], "mask": mask}, r"'ids' has shape \(3, 6\), the program takes \(3, 7\): pad or cut it"),
        ({"ids": ids[0], "mask": mask}, r"'ids' has shape \(7,\)"),
        ({"ids": ids + 97, "mask": mask}, "gather that makes .* out of bounds"),
        ({"ids": ids - 200, "mask": mask}, "gather that makes .*is negative"),
    ):
        with pytest.raises(ValueError, match=message):
            program.predict(inputs)
    with pytest.raises(ValueError, match=r"states: missing \[\], unknown \['keys'\]"):
        program.predict({"ids": ids, "mask": mask}, {"keys": ids})


def test_a_negative_index_is_refused_since_ios_17(tmp_path):
    case = ("gather", lambda x, i: mb.gather(x=x, indices=i, axis=0), None, [X, torch.tensor([-1]).int()])
    arrays = {"in0_0": as_array(X), "in0_1": np.int32([-1])}
    save_program(tmp_path / "16.mlpackage", [case], opset=IOS16)
    (result,) = MilProgram(tmp_path / "16.mlpackage").predict(arrays).values()
    assert np.array_equal(result, X[[-1]])
    save_program(tmp_path / "18.mlpackage", [case])
    with pytest.raises(ValueError, match="gather that makes .*index -1 is negative"):
        MilProgram(tmp_path / "18.mlpackage").predict(arrays)
