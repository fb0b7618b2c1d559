"""Graph pass: a scale and a shift of every channel as one node.

torch writes the end of a group normalisation as Mul, Add by constants. BatchNormalization with mean
0 and variance 1 is both, in one pass over the tensor, and every runtime knows it.

Measured with the built-in model in ONNX Runtime on two cores: a step of batch 1 is 4 to 6 %
shorter, of batch 8 3 %.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.export.graph import dims_of, replace_nodes, users_of

if TYPE_CHECKING:
    import onnx

EPSILON = 1e-5  # some libraries take none below; variance + EPSILON is 1


def join_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with x * scale + shift of every channel as one BatchNormalization.

    Only where both are constants (C, 1, ...), or (1, C, 1, ...), for x (B, C, ...) and nobody else
    takes the product.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    dims, users = dims_of(graph), users_of(graph)
    outputs = {output.name for output in graph.output}
    arrays = {c.name: onnx.numpy_helper.to_array(c) for c in graph.initializer}
    joined: dict[str, onnx.NodeProto] = {}  # an Add's output -> the node in its place
    gone: set[str] = set()
    for scale in graph.node:
        product = scale.output[0]
        if scale.op_type != "Mul" or product in outputs or len(users.get(product, ())) != 1:
            continue
        shift = users[product][0]
        size = _size(dims, product)
        x, factor = _channel_constant(scale, arrays, size)
        _, term = _channel_constant(shift, arrays, size)
        if shift.op_type != "Add" or factor is None or term is None or _size(dims, x) != size:
            continue
        result = shift.output[0]
        channels = np.ones(size[1], np.float32)
        constants = {
            f"{result}/scale": factor,
            f"{result}/shift": term,
            f"channels{size[1]}/mean": 0 * channels,
            f"channels{size[1]}/variance": (1 - EPSILON) * channels,
        }
        for name in [name for name in constants if name not in arrays]:
            arrays[name] = np.asarray(constants[name], np.float32)
            graph.initializer.append(onnx.numpy_helper.from_array(arrays[name], name))
        joined[result] = onnx.helper.make_node(
            "BatchNormalization", [x, *constants], [result], name=shift.name, epsilon=EPSILON
        )
        gone.add(product)
    nodes = [joined.get(node.output[0], node) for node in graph.node if node.output[0] not in gone]
    replace_nodes(graph, nodes)
    return model


def _channel_constant(
    node: onnx.NodeProto, arrays: dict[str, Array], size: list[int]
) -> tuple[str, Array | None]:
    """Of a node of two inputs, the one that is computed and the other's value a channel (C,).

    None if the other is no float32 constant with one value a channel, or one for all.
    """
    given = [name for name in node.input if name in arrays]
    computed = [name for name in node.input if name not in arrays]
    if len(given) != 1 or len(computed) != 1 or len(size) < 3 or not all(size[1:]):
        return "", None
    array = arrays[given[0]]
    shape = (1,) * (len(size) - array.ndim) + array.shape
    if array.dtype != np.float32 or len(shape) != len(size) or shape[1] not in (1, size[1]):
        return computed[0], None
    if any(n != 1 for n in (shape[0], *shape[2:])):
        return computed[0], None
    return computed[0], np.broadcast_to(array.reshape(-1), size[1:2])


def _size(dims: dict[str, list[onnx.TensorShapeProto.Dimension]], name: str) -> list[int]:
    return [d.dim_value for d in dims.get(name, ())]
