"""Graph passes: a float32 network typed in half precision, fp16 or bf16, float32 in and out.

Convolutions, products and what lies between them are computed in half precision. Normalisation,
softmax and every other reduction, and all that does not depend on x (the embeddings of the
timestep, whose angles reach 1000, and of the label) stay in float32. A builder that keeps to the
types in the file, as TensorRT does with a strongly typed network, then computes so whatever its
version.

A tensor's name stands for the node that makes it: unlike the names of nodes, it is always unique.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.export.graph import replace_nodes, users_of
from ddpm_edge.reference import ROUNDING

if TYPE_CHECKING:
    import onnx

HALF = tuple(ROUNDING)
LARGEST = {"fp16": 65504.0, "bf16": 3.3895e38}
BF16_OPSET = 22  # the first whose Conv takes bfloat16; our operators are otherwise those of 18
HALF_OPERATORS = frozenset({
    "Add", "AveragePool", "Clip", "Concat", "Conv", "ConvTranspose", "Expand", "Flatten", "Gemm",
    "Identity", "LeakyRelu", "MatMul", "MaxPool", "Mul", "Neg", "Pad", "Relu", "Reshape", "Resize",
    "Sigmoid", "Slice", "Split", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip
MOVES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
REDUCTIONS = frozenset({
    "GlobalAveragePool", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare",
})  # fmt: skip


def to_half(model: onnx.ModelProto, precision: str, keep: Collection[str] = ()) -> onnx.ModelProto:
    """A copy of a float32 model, in half precision where that is safe.

    Args:
        model: as `to_onnx` makes it.
        precision: "fp16" or "bf16".
        keep: outputs of nodes that stay in float32 as well.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    single, half = onnx.TensorProto.FLOAT, _half(precision)
    constants = {c.name: c for c in graph.initializer}
    types: dict[str, int] = dict.fromkeys(float_tensors(model), single)  # as they are made here
    chosen = half_nodes(model) - set(keep)
    nodes: list[onnx.NodeProto] = []
    made: dict[tuple[str, int], str] = {}

    def typed(name: str, wanted: int) -> str:
        """A float tensor in this type: itself, a constant of its values, or a Cast."""
        if types[name] == wanted:
            return name
        if (name, wanted) not in made:
            new = made[name, wanted] = f"{name}/{precision if wanted == half else 'fp32'}"
            if name in constants:
                graph.initializer.append(_constant(new, _values(constants[name]), wanted))
            else:
                nodes.append(_cast(name, new, wanted))
        return made[name, wanted]

    outputs = {output.name for output in graph.output}
    for node in graph.node:
        wanted = half if node.output[0] in chosen else single
        for i, name in enumerate(node.input):
            scale = node.op_type == "Resize" and i > 0  # float32 by its definition
            if name in types and not scale:
                node.input[i] = typed(name, wanted)
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name in outputs and wanted == half:
                made[name, half] = node.output[i] = f"{name}/{precision}"
                nodes.append(_cast(node.output[i], name, single))
            elif name in types:
                types[name] = wanted
    replace_nodes(graph, nodes)
    if precision == "bf16":
        (opset,) = (opset for opset in model.opset_import if opset.domain in ("", "ai.onnx"))
        opset.version = max(opset.version, BF16_OPSET)
    return model


def half_nodes(model: onnx.ModelProto) -> set[str]:
    """First outputs of the nodes that may be computed in half precision.

    They depend on x and have an operator of HALF_OPERATORS. They neither make what a reduction
    sums, whose squares overflow fp16 from 256 on, nor are made of reductions' results alone, such
    as a variance plus eps.
    """
    import onnx

    floats = float_tensors(onnx.shape_inference.infer_shapes(model))
    summed: set[str] = set()
    for node in reversed(model.graph.node):
        moved = node.op_type in MOVES and node.output[0] in summed
        if node.op_type in REDUCTIONS or moved:
            summed |= set(node.input)
    after_x: set[str] = {"x"}
    statistics: set[str] = set()
    found: set[str] = set()
    for node in model.graph.node:
        from_x = after_x.intersection(node.input)
        if not from_x:
            continue
        outputs = floats.intersection(node.output)  # sizes are no values
        after_x |= outputs
        if node.op_type in REDUCTIONS or from_x <= statistics:
            statistics |= outputs
        elif node.op_type in HALF_OPERATORS and node.output[0] in floats - summed:
            found.add(node.output[0])
    users = users_of(model.graph)
    between = {  # float32 on both sides: to move it in half precision would only lose digits
        node.output[0]
        for node in model.graph.node
        if node.op_type in MOVES
        and floats.intersection(node.input).isdisjoint(found)
        and found.isdisjoint(user.output[0] for user in users.get(node.output[0], ()))
    }
    return found - between


def rounded(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """What `to_half` made, for a runtime without half precision: the same rounding, in float32.

    Every node is computed in float32 from tensors that were rounded to half precision, and its
    result is rounded: what a GPU does that accumulates in float32. ONNX Runtime's CPU provider,
    left to itself, would compute chains of nodes in float32 and round only at their ends.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    single, half = onnx.TensorProto.FLOAT, _half(precision)
    halves = float_tensors(model, half)
    wide = {}  # tensors of half precision -> their values in float32
    for constant in [c for c in graph.initializer if c.name in halves]:
        wide[constant.name] = f"{constant.name}/wide"
        graph.initializer.append(_constant(wide[constant.name], _values(constant), single))
    nodes: list[onnx.NodeProto] = []

    for original in graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        if node.op_type == "Cast":
            nodes.append(node)
            continue
        for i, name in enumerate(node.input):
            if name in halves and name not in wide:
                wide[name] = f"{name}/wide"
                nodes.append(_cast(name, wide[name], single))
            node.input[i] = wide.get(name, name)
        given = [name for name in node.output if name in halves]
        for i, name in enumerate(node.output):
            node.output[i] = f"{name}/exact" if name in given else name
        nodes.append(node)
        nodes += [_cast(f"{name}/exact", name, half) for name in given]
    replace_nodes(graph, nodes)
    return model


def float_tensors(model: onnx.ModelProto, kind: int = 1) -> set[str]:
    """Names of all tensors of a type (float32), constants too; shapes must have been inferred."""
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    found = {v.name for v in values if v.type.tensor_type.elem_type == kind}
    return found | {c.name for c in graph.initializer if c.data_type == kind}


def layers(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, str]]:
    """Every node and what a person calls it: the layer whose weights it uses, or its own name."""
    constants = {c.name for c in model.graph.initializer}
    for node in model.graph.node:
        weights = [n for n in node.input if n in constants and n.endswith((".weight", ".bias"))]
        yield node, weights[0].rpartition(".")[0] if weights else node.name or node.output[0]


def _half(precision: str) -> int:
    import onnx

    kinds = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
    return int(kinds[precision])


def _cast(source: str, to: str, kind: int) -> onnx.NodeProto:
    import onnx

    return onnx.helper.make_node("Cast", [source], [to], name=f"cast to {to}", to=kind)


def _values(constant: onnx.TensorProto) -> Array:
    import onnx

    return np.asarray(onnx.numpy_helper.to_array(constant), np.float32)


def _constant(name: str, values: Array, kind: int) -> onnx.TensorProto:
    import onnx

    with np.errstate(over="ignore"):  # what becomes infinite is found by the gate
        typed = values.astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
    return onnx.numpy_helper.from_array(typed, name)
