"""Shapes of what ONNX operators give, by one short rule for each family of operators.

A rule is a function whose signature is the operator's (https://onnx.ai/onnx/operators, opset 13 and
later): inputs by position, attributes by name, so that Python's own call refuses what an operator
does not have. Sizes that come from numbers (of Reshape, Slice, Pad, ...) must be known: constants,
or sizes of other tensors. A rule that cannot be followed raises some ordinary exception; whoever
applies rules turns `MISFITS` into a refusal, so whatever is not understood is refused.
"""

# ruff: noqa: ARG001, D103  (signatures and meanings are the operators')
from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ddpm_edge.onnx_reader import DTYPES

MAX_CONSTANT = 256  # numbers of a constant that shapes may follow from
MAX_SCALE = 64.0  # of a Resize
MISFITS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)

Shape = tuple[int, ...]
Ints = Sequence[int] | None


class Value(NamedTuple):
    """What is known of a tensor.

    Attributes:
        numbers: its elements in a flat tuple, if they are known and it has at most one axis.
        work: multiply-adds that one element took.
    """

    dtype: str
    shape: Shape
    numbers: tuple[Any, ...] | None = None
    work: int = 1


def need(fits: bool, what: str) -> None:
    """Refuse a node."""
    if not fits:
        raise ValueError(what)


def known(x: Value) -> tuple[Any, ...]:
    """The numbers of a tensor that others take their sizes from."""
    if x.numbers is None:
        raise ValueError("sizes that are computed while running, expected constants")
    return x.numbers


def broadcast(*shapes: Shape) -> Shape:
    """The shape that all of these stretch to: aligned right, 1 stretches to anything."""
    if len(set(shapes)) == 1:
        return shapes[0]
    rank = max(map(len, shapes))
    sizes = []
    for column in zip(*((1,) * (rank - len(s)) + s for s in shapes), strict=True):
        wide = {n for n in column if n != 1} or {1}
        need(len(wide) == 1, f"{' and '.join(map(str, shapes))} do not broadcast")
        sizes.append(wide.pop())
    return tuple(sizes)


def positions(axes: Sequence[int], rank: int) -> list[int]:
    """Axes in 0..rank - 1, none twice; negative ones count from the end."""
    found = [range(rank)[axis] for axis in axes]
    need(len(set(found)) == len(found), f"axes {axes} name one twice")
    return found


# Elementwise


def elementwise(*xs: Value) -> Value:
    need(len({x.dtype for x in xs}) == 1, f"types {', '.join(x.dtype for x in xs)} differ")
    return Value(xs[0].dtype, broadcast(*(x.shape for x in xs)))


def binary(x: Value, y: Value, /) -> Value:
    return elementwise(x, y)


def logical(x: Value, y: Value, /) -> Value:
    need(x.dtype == y.dtype == "bool", f"types {x.dtype} and {y.dtype}, not bool")
    return elementwise(x, y)


def logical_not(x: Value, /) -> Value:
    return logical(x, x)


def unary(
    x: Value, /, *, alpha: float = 0, beta: float = 0, gamma: float = 0, approximate: str = ""
) -> Value:
    return Value(x.dtype, x.shape)


def identity(x: Value, /) -> Value:
    return x


def power(x: Value, y: Value, /) -> Value:
    return Value(x.dtype, broadcast(x.shape, y.shape))


def comparison(x: Value, y: Value, /) -> Value:
    return Value("bool", elementwise(x, y).shape)


def where(condition: Value, x: Value, y: Value, /) -> Value:
    need(condition.dtype == "bool", f"condition of type {condition.dtype}")
    return Value(elementwise(x, y).dtype, broadcast(condition.shape, x.shape, y.shape))


def clip(x: Value, low: Value | None = None, high: Value | None = None, /) -> Value:
    return Value(x.dtype, x.shape)


def along_axis(x: Value, /, *, axis: int = -1) -> Value:
    positions([axis], len(x.shape))
    return Value(x.dtype, x.shape)


def cast(x: Value, /, *, to: int, saturate: int = 1, round_mode: str = "") -> Value:
    dtype = DTYPES[to][0]
    whole = dtype in ("int32", "int64") and x.dtype in ("int32", "int64")
    return Value(dtype, x.shape, x.numbers if whole else None)


def quantize(
    x: Value, scale: Value, zero: Value | None = None, /, *, axis: int = 1, saturate: int = 1
) -> Value:
    need("float" in x.dtype, f"{x.dtype} is not quantised")
    kind = zero.dtype if zero else "uint8"
    _check_scale(x, scale, zero, axis, kind)
    return Value(kind, x.shape)


def dequantize(x: Value, scale: Value, zero: Value | None = None, /, *, axis: int = 1) -> Value:
    _check_scale(x, scale, zero, axis, x.dtype)
    return Value(scale.dtype, x.shape)


def _check_scale(x: Value, scale: Value, zero: Value | None, axis: int, kind: str) -> None:
    """One scale for all, or one for each index of an axis; 8-bit integers, of this kind."""
    need(kind in ("int8", "uint8"), f"integers of type {kind}")
    need("float" in scale.dtype, f"scale of type {scale.dtype}")
    if scale.shape not in ((), (1,)):
        (along,) = positions([axis], len(x.shape))
        need(scale.shape == (x.shape[along],), f"scale {scale.shape} for {x.shape}, axis {axis}")
    if zero is not None:
        need(zero.dtype == kind, f"zero point of type {zero.dtype} for {kind}")
        need(zero.shape == scale.shape, "zero point and scale of different shapes")


# Linear maps


def matmul(a: Value, b: Value, /) -> Value:
    (*some, m, k), (*others, k2, n) = a.shape, b.shape
    need(k == k2 and a.dtype == b.dtype, f"{a.shape} times {b.shape}")
    return Value(a.dtype, (*broadcast(tuple(some), tuple(others)), m, n), work=k)


def gemm(
    a: Value, b: Value, c: Value | None = None, /, *,
    alpha: float = 1, beta: float = 1, transA: int = 0, transB: int = 0,
) -> Value:  # fmt: skip
    m, k = a.shape[::-1] if transA else a.shape
    k2, n = b.shape[::-1] if transB else b.shape
    need(k == k2 and a.dtype == b.dtype, f"{a.shape} times {b.shape}")
    need(c is None or broadcast(c.shape, (m, n)) == (m, n), "C does not fit")
    return Value(a.dtype, (m, n), work=k)


class Windows(NamedTuple):
    """Where a kernel stands: strides, pads and dilations as the attributes of the same names."""

    kernel: Sequence[int]
    strides: Sequence[int]
    dilations: Sequence[int]
    pads: list[int]  # both ends of each axis together
    reach: list[int]  # of the kernel, from its first element to its last

    @classmethod
    def of(
        cls, kernel: Sequence[int], strides: Ints, pads: Ints, dilations: Ints, auto_pad: str
    ) -> Windows:
        """From the attributes of a node."""
        axes = len(kernel)
        strides, dilations = strides or (1,) * axes, dilations or (1,) * axes
        pads = pads or (0,) * 2 * axes
        need(auto_pad in ("NOTSET", "VALID"), "auto_pad other than NOTSET")
        need(len(strides) == len(dilations) == axes and len(pads) == 2 * axes, "wrong rank")
        need(min(*kernel, *strides, *dilations) >= 1, "a kernel, stride or dilation below 1")
        reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        inside = all(0 <= pad <= far for pad, far in zip(pads, reach * 2, strict=True))
        need(inside, f"pads {tuple(pads)} wider than the kernel, or negative")
        both = [pads[i] + pads[i + axes] for i in range(axes)]
        return cls(kernel, strides, dilations, both, reach)

    def fit(self, sizes: Sequence[int], ceil: int = 0) -> list[int]:
        """How many windows stand in each axis."""
        axes = zip(sizes, self.pads, self.reach, self.strides, strict=True)
        return [
            (size + pad - reach - 1 + (stride - 1 if ceil else 0)) // stride + 1
            for size, pad, reach, stride in axes
        ]


def conv(
    x: Value, w: Value, bias: Value | None = None, /, *,
    auto_pad: str = "NOTSET", dilations: Ints = None, group: int = 1, kernel_shape: Ints = None,
    pads: Ints = None, strides: Ints = None,
) -> Value:  # fmt: skip
    (n, channels, *sizes), (out, in_group, *kernel) = x.shape, w.shape
    need(tuple(kernel_shape or kernel) == tuple(kernel), "kernel_shape is not the weights'")
    need(channels == in_group * group and out % group == 0, f"{x.shape} by {w.shape}")
    need(x.dtype == w.dtype and (bias is None or bias.shape == (out,)), "bias or type")
    windows = Windows.of(kernel, strides, pads, dilations, auto_pad)
    return Value(x.dtype, (n, out, *windows.fit(sizes)), work=math.prod(w.shape[1:]))


def conv_transpose(
    x: Value, w: Value, bias: Value | None = None, /, *,
    auto_pad: str = "NOTSET", dilations: Ints = None, group: int = 1, kernel_shape: Ints = None,
    output_padding: Ints = None, pads: Ints = None, strides: Ints = None,
) -> Value:  # fmt: skip
    (n, channels, *sizes), (channels2, out_group, *kernel) = x.shape, w.shape
    out = out_group * group
    need(tuple(kernel_shape or kernel) == tuple(kernel), "kernel_shape is not the weights'")
    need(channels == channels2 and channels % group == 0, f"{x.shape} by {w.shape}")
    need(x.dtype == w.dtype and (bias is None or bias.shape == (out,)), "bias or type")
    windows = Windows.of(kernel, strides, pads, dilations, auto_pad)
    extra = output_padding or (0,) * len(kernel)
    need(all(0 <= e < s for e, s in zip(extra, windows.strides, strict=True)), "output_padding")
    axes = zip(sizes, windows.strides, windows.reach, windows.pads, extra, strict=True)
    grown = [(size - 1) * stride + reach + 1 - pad + e for size, stride, reach, pad, e in axes]
    return Value(x.dtype, (n, out, *grown), work=math.prod(w.shape) // out_group)


def pool(
    x: Value, /, *,
    kernel_shape: Sequence[int], auto_pad: str = "NOTSET", ceil_mode: int = 0,
    count_include_pad: int = 0, dilations: Ints = None, pads: Ints = None, storage_order: int = 0,
    strides: Ints = None,
) -> Value:  # fmt: skip
    n, channels, *sizes = x.shape
    windows = Windows.of(kernel_shape, strides, pads, dilations, auto_pad)
    counts = windows.fit(sizes, ceil_mode)
    return Value(x.dtype, (n, channels, *counts), work=math.prod(kernel_shape))


def global_pool(x: Value, /) -> Value:
    n, channels, *sizes = x.shape
    return Value(x.dtype, (n, channels, *(1 for _ in sizes)), work=math.prod(sizes))


# Normalisation


def channel_norm(x: Value, /, *parameters: Value, epsilon: float = 1e-5, momentum: float = 0.9,
                 training_mode: int = 0) -> Value:  # fmt: skip
    need(all(p.shape == x.shape[1:2] for p in parameters), "a parameter that has not C elements")
    need(not training_mode, "training mode")
    return Value(x.dtype, x.shape)


def group_norm(x: Value, scale: Value, bias: Value, /, *, num_groups: int, epsilon: float = 1e-5,
               stash_type: int = 1) -> Value:  # fmt: skip
    need(x.shape[1] % num_groups == 0, f"{num_groups} groups of {x.shape[1]} channels")
    return Value(x.dtype, x.shape)


def layer_norm(x: Value, scale: Value, bias: Value | None = None, /, *, axis: int = -1,
               epsilon: float = 1e-5, stash_type: int = 1) -> Value:  # fmt: skip
    (first,) = positions([axis], len(x.shape))
    for p in (scale, bias or scale):
        need(broadcast(p.shape, x.shape[first:]) == x.shape[first:], "a parameter does not fit")
    return Value(x.dtype, x.shape)


# Moving data


def shape(x: Value, /, *, start: int = 0, end: int | None = None) -> Value:
    sizes = x.shape[start:end]
    return Value("int64", (len(sizes),), sizes)


def constant(**values: Any) -> Value:
    ((kind, value),) = values.items()  # exactly one
    if kind == "value":
        return _tensor(value)
    number, dtype = {"value_int": (int, "int64"), "value_float": (float, "float32")}[
        kind.removesuffix("s")
    ]
    many = kind.endswith("s")
    numbers = tuple(value) if many else (value,)
    need({*map(type, numbers)} <= {number}, f"{kind} of another type")
    return Value(dtype, (len(numbers),) if many else (), numbers)


def constant_of_shape(sizes: Value, /, *, value: Value | None = None) -> Value:
    return Value("float32" if value is None else _tensor(value).dtype, known(sizes))


def range_(start: Value, limit: Value, delta: Value, /) -> Value:
    numbers = range(*(n for x in (start, limit, delta) for n in known(x)))
    return Value(start.dtype, (len(numbers),))


def reshape(x: Value, target: Value, /, *, allowzero: int = 0) -> Value:
    sizes = [x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(known(target))]
    if -1 in sizes:
        rest = math.prod(n for n in sizes if n != -1)
        sizes[sizes.index(-1)] = math.prod(x.shape) // rest
    need(min(sizes, default=1) >= 1, f"{x.shape} as {known(target)}")
    need(math.prod(sizes) == math.prod(x.shape), f"{x.shape} as {known(target)}")
    return Value(x.dtype, tuple(sizes), x.numbers if len(sizes) <= 1 else None)


def flatten(x: Value, /, *, axis: int = 1) -> Value:
    return Value(x.dtype, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


def squeeze(x: Value, axes: Value, /) -> Value:
    gone = positions(known(axes), len(x.shape))
    need(all(x.shape[axis] == 1 for axis in gone), f"axes {known(axes)} of {x.shape} are not 1")
    return Value(x.dtype, tuple(n for i, n in enumerate(x.shape) if i not in gone), x.numbers)


def unsqueeze(x: Value, axes: Value, /) -> Value:
    rank = len(x.shape) + len(known(axes))
    new, sizes = positions(known(axes), rank), iter(x.shape)
    grown = tuple(1 if i in new else next(sizes) for i in range(rank))
    return Value(x.dtype, grown, x.numbers if rank <= 1 else None)


def transpose(x: Value, /, *, perm: Ints = None) -> Value:
    perm = range(len(x.shape))[::-1] if perm is None else perm
    need(sorted(perm) == list(range(len(x.shape))), f"perm {perm} of {x.shape}")
    return Value(x.dtype, tuple(x.shape[axis] for axis in perm))


def concat(*xs: Value, axis: int) -> Value:
    (axis,) = positions([axis], len(xs[0].shape))
    rests = {(x.dtype, x.shape[:axis], x.shape[axis + 1 :]) for x in xs}
    need(len(rests) == 1, f"{' and '.join(str(x.shape) for x in xs[:9])} along axis {axis}")
    size = sum(x.shape[axis] for x in xs)
    numbers = None
    if size <= MAX_CONSTANT and all(x.numbers is not None for x in xs):
        numbers = tuple(n for x in xs for n in known(x))
    return Value(xs[0].dtype, _with(xs[0].shape, axis, size), numbers)


def split(
    x: Value, parts: Value | None = None, /, *, axis: int = 0, num_outputs: int = 0
) -> tuple[Value, ...]:
    (axis,) = positions([axis], len(x.shape))
    size = x.shape[axis]
    if parts:
        sizes = known(parts)
    else:  # equal, the last one smaller; num_outputs <= size, as no part may be empty
        need(0 < num_outputs <= min(size, MAX_CONSTANT), f"{num_outputs} parts of {size}")
        step = -(-size // num_outputs)
        sizes = (*(step,) * (num_outputs - 1), size - step * (num_outputs - 1))
    need(sum(sizes) == size and min(sizes) > 0, f"parts {sizes} of {size}")
    return tuple(Value(x.dtype, _with(x.shape, axis, n)) for n in sizes)


def slice_(
    x: Value, starts: Value, ends: Value, axes: Value | None = None, steps: Value | None = None, /
) -> Value:
    first, last = known(starts), known(ends)
    along = positions(known(axes) if axes else range(len(first)), len(x.shape))
    by = known(steps) if steps else (1,) * len(first)
    cuts = [slice(None)] * len(x.shape)
    for axis, *cut in zip(along, first, last, by, strict=True):
        cuts[axis] = slice(*cut)
    kept = tuple(len(range(n)[cut]) for n, cut in zip(x.shape, cuts, strict=True))
    return Value(x.dtype, kept, x.numbers[cuts[0]] if x.numbers and cuts else None)


def gather(x: Value, indices: Value, /, *, axis: int = 0) -> Value:
    (axis,) = positions([axis], len(x.shape))
    picked = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    numbers = None
    if x.numbers is not None and indices.numbers is not None:
        numbers = tuple(x.numbers[i] for i in indices.numbers)
    return Value(x.dtype, picked, numbers)


def expand(x: Value, sizes: Value, /) -> Value:
    return Value(x.dtype, broadcast(x.shape, known(sizes)))


def tile(x: Value, repeats: Value, /) -> Value:
    return Value(x.dtype, tuple(n * r for n, r in zip(x.shape, known(repeats), strict=True)))


def pad(
    x: Value, pads: Value, value: Value | None = None, axes: Value | None = None, /, *,
    mode: str = "constant",
) -> Value:  # fmt: skip
    along = positions(known(axes) if axes else range(len(x.shape)), len(x.shape))
    before_after = known(pads)
    need(len(before_after) == 2 * len(along), f"{len(before_after)} pads of {len(along)} axes")
    sizes = list(x.shape)
    for i, axis in enumerate(along):
        before, after = before_after[i], before_after[i + len(along)]
        need(min(before, after) > -sizes[axis], "pads that take everything away")
        sizes[axis] += before + after
    return Value(x.dtype, tuple(sizes))


def resize(
    x: Value, roi: Value | None = None, scales: Value | None = None, sizes: Value | None = None, /,
    *, antialias: int = 0, coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75, exclude_outside: int = 0, extrapolation_value: float = 0,
    keep_aspect_ratio_policy: str = "stretch", mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Value:  # fmt: skip
    need(coordinate_transformation_mode != "tf_crop_and_resize", "a region of interest")
    need(keep_aspect_ratio_policy == "stretch", "keep_aspect_ratio_policy")
    if sizes is not None and known(sizes):
        need(scales is None or not known(scales), "both scales and sizes")
        larger = known(sizes)
        need(len(larger) == len(x.shape), f"sizes {larger} of {x.shape}")
    else:
        factors = known(scales)  # type: ignore[arg-type]  # None: refused as any misfit
        need(all(0 < f <= MAX_SCALE for f in factors), f"scales {factors}")
        exact = [n * f for n, f in zip(x.shape, factors, strict=True)]
        larger = tuple(map(math.floor, exact))
        same = larger == tuple(math.floor(_float32(size)) for size in exact)
        need(same, f"scales {factors} of {x.shape}, which runtimes round to different sizes")
    return Value(x.dtype, larger)


def depth_to_space(x: Value, /, *, blocksize: int, mode: str = "DCR") -> Value:
    n, channels, h, w = x.shape
    need(blocksize > 0 and channels % blocksize**2 == 0, f"blocks of {blocksize} in {channels}")
    return Value(x.dtype, (n, channels // blocksize**2, h * blocksize, w * blocksize))


def space_to_depth(x: Value, /, *, blocksize: int) -> Value:
    n, channels, h, w = x.shape
    need(blocksize > 0 and h % blocksize == w % blocksize == 0, f"blocks of {blocksize}")
    return Value(x.dtype, (n, channels * blocksize**2, h // blocksize, w // blocksize))


def reduce(
    x: Value, indices: Value | None = None, /, *,
    axes: Ints = None, keepdims: int = 1, noop_with_empty_axes: int = 0,
) -> Value:  # fmt: skip
    need(indices is None or axes is None, "axes given twice")
    need(keepdims in (0, 1) and not noop_with_empty_axes, "keepdims or noop_with_empty_axes")
    which = known(indices) if indices else axes or ()
    gone = positions(which or range(len(x.shape)), len(x.shape))
    sizes = [1 if i in gone else n for i, n in enumerate(x.shape) if keepdims or i not in gone]
    return Value(x.dtype, tuple(sizes), work=math.prod(x.shape[i] for i in gone))


def _tensor(value: Any) -> Value:
    need(isinstance(value, Value), "a value that is no tensor")
    result: Value = value
    return result


def _float32(value: float) -> float:
    """A product of two float32, rounded as float32 rounds it."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def _with(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _table(rules: dict[Callable[..., Any], str]) -> dict[str, Callable[..., Any]]:
    return {name: rule for rule, names in rules.items() for name in names.split()}


RULES = _table({
    elementwise: "Max Mean Min Sum", binary: "Add Div Mul PRelu Sub",
    logical: "And Or Xor", logical_not: "Not",
    unary: "Abs Ceil Celu Cos Elu Erf Exp Floor Gelu HardSigmoid HardSwish LeakyRelu Log Mish Neg "
           "Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Swish Tanh",
    comparison: "Equal Greater GreaterOrEqual Less LessOrEqual",
    identity: "Identity", power: "Pow", where: "Where", clip: "Clip", cast: "Cast",
    along_axis: "Softmax LogSoftmax",
    quantize: "QuantizeLinear", dequantize: "DequantizeLinear",
    matmul: "MatMul", gemm: "Gemm", conv: "Conv", conv_transpose: "ConvTranspose",
    pool: "AveragePool MaxPool", global_pool: "GlobalAveragePool GlobalMaxPool",
    channel_norm: "BatchNormalization InstanceNormalization",
    group_norm: "GroupNormalization", layer_norm: "LayerNormalization RMSNormalization",
    shape: "Shape", constant: "Constant", constant_of_shape: "ConstantOfShape", range_: "Range",
    reshape: "Reshape", flatten: "Flatten", squeeze: "Squeeze", unsqueeze: "Unsqueeze",
    transpose: "Transpose", concat: "Concat", split: "Split", slice_: "Slice", gather: "Gather",
    expand: "Expand", tile: "Tile", pad: "Pad", resize: "Resize",
    depth_to_space: "DepthToSpace", space_to_depth: "SpaceToDepth",
    reduce: "ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare",
})  # fmt: skip
