"""What the graph passes share: who uses a tensor, how large it is, and new nodes for old."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def dims_of(graph: onnx.GraphProto) -> dict[str, list[onnx.TensorShapeProto.Dimension]]:
    """The dimensions of every tensor but the constants; shapes must have been inferred."""
    values = (*graph.value_info, *graph.input, *graph.output)
    return {v.name: list(v.type.tensor_type.shape.dim) for v in values}


def users_of(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that take a tensor, in order; one that takes it twice is there twice."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    return users


def replace_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Put these nodes in the place of the graph's, and drop the constants that nobody uses now."""
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [c for c in graph.initializer if c.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.ClearField("value_info")
