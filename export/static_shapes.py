"""Graph pass: reshapes with constant targets instead of shapes computed while running.

torch writes group normalisation as Reshape, InstanceNormalization, Reshape(.., Shape(input)). All
sizes but the batch are known, and Reshape has a word for the batch: 0 copies it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ddpm_edge.export.graph import dims_of

if TYPE_CHECKING:
    import onnx


def make_static(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every Reshape to `Shape(y)` turned into a Reshape to [0, C, H, W].

    Only where y's first dimension is the batch that the reshaped tensor also begins with and all
    others are known; other nodes stay as they are.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    dims = dims_of(graph)
    shape_of = {node.output[0]: node for node in graph.node if node.op_type == "Shape"}
    for node in graph.node:
        source = shape_of.get(node.input[1]) if node.op_type == "Reshape" else None
        if source is None or any(a.i for a in (*source.attribute, *node.attribute)):
            continue  # a part of the shape, or a Reshape in which 0 does not copy
        target, given = dims.get(source.input[0]), dims.get(node.input[0])
        if not target or not given or not _same_batch(target[0], given[0]):
            continue
        sizes = [d.dim_value for d in target[1:]]
        if not all(sizes):
            continue
        name = f"{node.output[0]}_shape"
        constant = np.array([0, *sizes], np.int64)
        graph.initializer.append(onnx.numpy_helper.from_array(constant, name))
        node.input[1] = name
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    for node in [n for n in shape_of.values() if n.output[0] not in used]:
        graph.node.remove(node)
    return model


def _same_batch(a: onnx.TensorShapeProto.Dimension, b: onnx.TensorShapeProto.Dimension) -> bool:
    return bool(a.dim_param) and a.dim_param == b.dim_param
