"""Whether an ONNX file is a plain feed-forward network of finite size that fits its manifest.

A runtime does whatever a file says: 144 bytes of ConstantOfShape take 4 GB, a Loop never ends,
external data open other files. So a model is accepted only if every operator is one whose rule is
in `onnx_shapes`, and if every size follows from the batch before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ddpm_edge.errors import BundleError
from ddpm_edge.manifest import Manifest
from ddpm_edge.onnx_reader import MAX_RANK, SIZES, Model, Node, Tensor, ValueInfo, read_model
from ddpm_edge.onnx_shapes import MAX_CONSTANT, MISFITS, RULES, Value

IR_VERSIONS = range(7, 15)  # those of the operator sets below, up to ONNX 1.23
OPSETS = range(13, 27)  # before 13 Squeeze, Split, ... take their sizes from attributes
DOMAINS = ("", "ai.onnx")  # two names of the same operators
MAX_NODES = 10_000  # the built-in network has 322; a layer is exported as some ten
MAX_PORTS = 1024  # inputs or outputs of one node
MAX_TENSOR_BYTES = 1 << 30  # a sample; attention among 64 x 64 pixels with 16 heads takes as much
MAX_LIVE_BYTES = 4 << 30  # a sample; a device of 8 GB has to hold the weights as well
MAX_WORK = 10**14  # multiply-adds a sample and evaluation; the largest U-Nets take some 1e13
BATCH = 61  # tried besides 1: does every size follow the batch, and none grow faster than it?
ITEMS = 10  # as many of a file's things are named in a message


def check_model(data: bytes, manifest: Manifest) -> int:
    """Refuse an ONNX file that a runtime should not see.

    Args:
        data: the file.
        manifest: what it must be: inputs x (batch, *sample_shape), t and, with classes, label;
            output prediction, of x's shape.

    Returns:
        The largest number of bytes that intermediate tensors take at any moment, at batch 1.

    Raises:
        BundleError: with the reason.
    """
    model = read_model(data)
    _check_header(model)
    _check_properties(model, manifest)
    _check_interface(model, manifest)
    values, peak = infer_shapes(model)
    larger, _ = infer_shapes(model, BATCH)
    for name, value in values.items():
        if math.prod(larger[name].shape) > BATCH * math.prod(value.shape):
            raise _refusal(
                f"{name!r} is {value.shape} for one sample, {larger[name].shape} for {BATCH}",
                "sizes that grow no faster than the batch",
            )
    got, expected = larger["prediction"][:2], ("float32", (BATCH, *manifest.sample_shape))
    if got != expected:
        raise _refusal(f"prediction is {_show(*got)} for {BATCH} samples", _show(*expected))
    return peak


def infer_shapes(model: Model, batch: int = 1) -> tuple[dict[str, Value], int]:
    """Every tensor of the graph at this batch, and the peak of live bytes.

    Raises:
        BundleError: a tensor that is undefined, defined twice, or of no or an absurd size.
    """
    values: dict[str, Value] = {}

    def define(name: str, value: Value) -> None:
        if not name or name in values:
            raise _refusal(f"tensor {name!r} has no name or is defined twice", "one definition")
        values[name] = value

    for given in model.inputs:
        sizes = (batch if isinstance(size, str) else size for size in given.dims or ())
        define(given.name, Value(given.dtype, tuple(sizes)))
    live = peak = sum(map(_bytes, values.values()))
    for tensor in model.initializers:
        define(tensor.name, _constant(model, tensor))
    last_use = {name: i for i, node in enumerate(model.nodes) for name in node.inputs}
    freed = last_use | {tensor.name: -1 for tensor in model.initializers} | {"prediction": -1}
    work = 0
    for i, node in enumerate(model.nodes):
        for name, value in zip(node.outputs, _apply(model, node, values, batch), strict=True):
            define(name, value)
            live += _bytes(value)
            work += math.prod(value.shape) * value.work
        peak = max(peak, live)
        if live > MAX_LIVE_BYTES * batch or work > MAX_WORK * batch:
            raise _refusal(
                f"up to {_name(node)} a batch of {batch} takes {live} bytes at once and {work} "
                "multiply-adds",
                f"at most {MAX_LIVE_BYTES} and {MAX_WORK} a sample",
            )
        for name in {*node.inputs, *node.outputs} - {""}:
            if freed.get(name, i) == i:
                live -= _bytes(values[name])
    if "prediction" not in values:
        raise _refusal("no node gives prediction", "one that does")
    return values, peak


def _apply(model: Model, node: Node, values: dict[str, Value], batch: int) -> tuple[Value, ...]:
    """What a node gives."""
    if node.operator not in RULES or node.domain not in DOMAINS or node.subgraph:
        graph = f" with a graph in its {node.subgraph}" if node.subgraph else ""
        raise _refusal(
            f"{_name(node)} is operator {node.domain or DOMAINS[-1]}.{node.operator}{graph}",
            f"one of the {len(RULES)} operators of ai.onnx that ddpm_edge.onnx_shapes lists",
        )
    if max(len(node.inputs), len(node.outputs)) > MAX_PORTS:
        raise _refusal(f"{_name(node)} has more than {MAX_PORTS} inputs or outputs", "fewer")
    for name in node.inputs:
        if name and name not in values:
            raise _refusal(f"{_name(node)} uses {name!r} before it is defined", "nodes in order")
    attributes = {
        key: _constant(model, value) if isinstance(value, Tensor) else value
        for key, value in node.attributes.items()
    }
    inputs = [values[name] if name else None for name in node.inputs]
    try:
        result = RULES[node.operator](*inputs, **attributes)
        results = (result,) if isinstance(result, Value) else tuple(result)
    except MISFITS as error:
        raise _refusal(
            f"{_name(node)} does not fit its operator: {str(error)[:300]}", "what it takes"
        ) from error
    if len(results) != len(node.outputs):
        raise _refusal(f"{_name(node)} has {len(node.outputs)} outputs", f"{len(results)}")
    for value in results:
        sound = {*map(type, value.shape)} <= {int} and min(value.shape, default=1) > 0
        if not sound or len(value.shape) > MAX_RANK or _bytes(value) > MAX_TENSOR_BYTES * batch:
            raise _refusal(
                f"{_name(node)} has shape {value.shape[:ITEMS]} for a batch of {batch}",
                f"at most {MAX_RANK} axes, none empty, and {MAX_TENSOR_BYTES} bytes a sample",
            )
    return tuple(map(_forget_many, results))


def _constant(model: Model, tensor: Tensor) -> Value:
    """A tensor of the file, with its numbers if shapes could follow from them."""
    if tensor.external:
        raise _refusal(f"the data of {tensor.name!r} are outside the file", "data inside")
    few = len(tensor.dims) <= 1 and math.prod(tensor.dims) <= MAX_CONSTANT
    readable = few and tensor.dtype in ("int32", "int64", "float32")
    numbers = tensor.read(model.data) if readable else None
    return Value(tensor.dtype, tensor.dims, numbers)


def _forget_many(value: Value) -> Value:
    many = value.numbers is not None and len(value.numbers) > MAX_CONSTANT
    return value._replace(numbers=None) if many else value


def _check_header(model: Model) -> None:
    if model.ir_version not in IR_VERSIONS:
        raise _refusal(f"IR version {model.ir_version}", f"{IR_VERSIONS[0]}..{IR_VERSIONS[-1]}")
    if [(d in DOMAINS, v in OPSETS) for d, v in model.opsets] != [(True, True)]:
        raise _refusal(
            f"operator sets {model.opsets[:ITEMS]}",
            f"ai.onnx alone, version {OPSETS[0]}..{OPSETS[-1]}",
        )
    for what in ("functions", "training_info", "sparse_initializers"):
        if getattr(model, what):
            raise _refusal(f"{getattr(model, what)} {what}", "none")
    if len(model.nodes) > MAX_NODES:
        raise _refusal(f"{len(model.nodes)} nodes", f"at most {MAX_NODES}")


def _check_properties(model: Model, manifest: Manifest) -> None:
    """What the file repeats of the manifest, if it does."""
    for key, value in manifest.properties().items():
        got = model.properties.get(key, value)
        if got != value:
            raise _refusal(f"a model of {key} {got[:80]}", f"{value[:80]}, as the manifest says")


def _check_interface(model: Model, manifest: Manifest) -> None:
    """Inputs and outputs as they are declared; the batch may have any name."""
    inputs = {name: (dtype, ("", *shape)) for name, (dtype, shape) in manifest.inputs.items()}
    for what, given, expected in (
        ("inputs", model.inputs, inputs),
        ("outputs", model.outputs, {"prediction": inputs["x"]}),
    ):
        if len(given) != len(expected) or dict(map(_declared, given)) != expected:
            got = map(_declared, given[:ITEMS])
            raise _refusal(f"{what} {_list(got)}", _list(expected.items()))


def _declared(value: ValueInfo) -> tuple[str, tuple[str, Any]]:
    batch = ("" if isinstance(size, str) else size for size in (value.dims or ())[:1])
    return value.name, (value.dtype, (*batch, *(value.dims or ())[1:]))


def _show(dtype: str, shape: tuple[int | str, ...], name: str = "") -> str:
    return f"{name} {dtype} ({', '.join(str(size) or 'batch' for size in shape)})".strip()


def _list(values: Iterable[tuple[str, tuple[str, Any]]]) -> str:
    return ", ".join(_show(dtype, shape, name) for name, (dtype, shape) in values)


def _bytes(value: Value) -> int:
    return math.prod(value.shape) * SIZES[value.dtype]


def _name(node: Node) -> str:
    return f"node {node.name!r} ({node.operator} -> {', '.join(node.outputs[:ITEMS])})"


def _refusal(got: str, expected: str) -> BundleError:
    return BundleError(
        f"the model is refused: got {got[:1000]}; expected {expected}. Copy the bundle again, or "
        "export a network that fits with ddpm-edge export"
    )
