"""The reader against protobuf, the shape rules against onnx's own inference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import TINY, tiny_model

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper

from ddpm_edge.bundle import BUILT_IN, Bundle
from ddpm_edge.errors import BundleError
from ddpm_edge.onnx_check import check_model, infer_shapes
from ddpm_edge.onnx_reader import DTYPES, read_model
from ddpm_edge.onnx_shapes import RULES, Value


def at_batch(model: onnx.ModelProto, batch: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What onnx infers for every tensor that a node gives, at this batch."""
    model = onnx.load_from_string(model.SerializeToString())
    model.graph.ClearField("value_info")
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = batch
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    return {
        v.name: (
            DTYPES[v.type.tensor_type.elem_type][0],
            tuple(d.dim_value for d in v.type.tensor_type.shape.dim),
        )
        for v in (*model.graph.value_info, *model.graph.output)
    }


def compare(model: onnx.ModelProto, batch: int = 1) -> dict[str, Value]:
    """Every tensor's type and shape are onnx's."""
    expected = at_batch(model, batch)
    values, _ = infer_shapes(read_model(model.SerializeToString()), batch)
    assert set(expected) == {name for node in model.graph.node for name in node.output}
    assert {name: values[name][:2] for name in expected} == expected
    return values


# Whole networks


def test_built_in_network() -> None:
    model = onnx.load(BUILT_IN / "unet.onnx")
    for batch in (1, 5):
        compare(model, batch)
    assert 0 < check_model(model.SerializeToString(), Bundle.open().manifest) < 10e6


def test_tiny_network() -> None:
    compare(tiny_model(), 3)
    check_model(tiny_model().SerializeToString(), TINY)


def test_exported_unet() -> None:
    pytest.importorskip("torch")
    from ddpm_edge.export.to_onnx import to_onnx
    from ddpm_edge.train.unet import UNet, UNetConfig

    shape = (3, 8, 12)
    manifest = replace(TINY, sample_shape=shape)
    config = UNetConfig(shape, (8, 16), 1, attention=(1,), groups=4, classes=2)
    data = to_onnx(UNet(config), manifest)
    compare(onnx.load_from_string(data), 5)
    check_model(data, manifest)


def test_unet_of_diffusers() -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from ddpm_edge.export.to_onnx import onnx_model

    class Answer(torch.nn.Module):
        """diffusers answers an object around the tensor."""

        def __init__(self) -> None:
            super().__init__()
            self.unet = diffusers.UNet2DModel(
                sample_size=8,
                block_out_channels=(8, 16),
                layers_per_block=1,
                norm_num_groups=4,
                attention_head_dim=4,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            )

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.unet(x, t).sample

    example = {"x": np.zeros((2, 3, 8, 8), np.float32), "t": np.zeros(2, np.int64)}
    model = onnx_model(Answer(), example, ["prediction"])
    compare(model, 5)
    manifest = replace(TINY, sample_shape=(3, 8, 8), class_names=())
    check_model(model.SerializeToString(), manifest)


# One operator each: what it takes (a shape = data, an array = a constant), its attributes


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def floats(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


A = (2, 4, 6, 5)
TEN = np.arange(10)
OPERATORS: list[tuple[str, list[Any], dict[str, Any]]] = [
    *((op, [A], {}) for op in (
        "Abs", "Ceil", "Celu", "Cos", "Elu", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish",
        "Identity", "LeakyRelu", "Log", "LogSoftmax", "Mish", "Neg", "Reciprocal", "Relu", "Round",
        "Selu", "Sigmoid", "Sign", "Sin", "Softmax", "Softplus", "Softsign", "Sqrt", "Tanh",
        "GlobalAveragePool", "GlobalMaxPool",
    )),
    *((op, [A, (4, 1, 5)], {}) for op in (
        "Add", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean",
        "Min", "Mul", "Pow", "PRelu", "Sub", "Sum",
    )),
    ("Sum", [A, (1, 6, 1), (2, 1, 1, 5)], {}),
    ("Gelu", [A], {"approximate": "tanh"}),
    ("Softmax", [A], {"axis": 1}),
    ("Clip", [A, floats(0).reshape(()), ""], {}),
    *((op, [np.ones(A, bool), np.ones(5, bool)], {}) for op in ("And", "Or", "Xor")),
    ("Not", [np.ones(A, bool)], {}),
    ("Where", [np.ones((6, 1), bool), A, (5,)], {}),
    ("Cast", [A], {"to": TensorProto.FLOAT16}),
    ("QuantizeLinear", [A, (), np.zeros((), np.int8)], {}),
    ("QuantizeLinear", [A, (4,)], {"axis": 1}),
    ("DequantizeLinear", [np.zeros(A, np.int8), (2,), np.zeros(2, np.int8)], {"axis": 0}),
    ("QuantizeLinear", [A, (6,), np.zeros(6, np.uint8)], {"axis": -2}),
    ("DequantizeLinear", [np.zeros(A, np.int8), (4,), np.zeros(4, np.int8)], {}),
    ("DequantizeLinear", [np.zeros(A, np.uint8), ()], {}),
    ("MatMul", [A, (5, 7)], {}),
    ("MatMul", [(4, 1, 3, 5), (6, 5, 7)], {}),
    ("Gemm", [(3, 4), (4, 5), (5,)], {}),
    ("Gemm", [(4, 3), (5, 4)], {"transA": 1, "transB": 1, "alpha": 0.5}),
    ("Conv", [A, (8, 4, 3, 3), (8,)], {"pads": [1] * 4}),
    ("Conv", [A, (8, 2, 3, 2)],
     {"group": 2, "strides": [2, 3], "dilations": [2, 1], "pads": [1, 0, 2, 1]}),
    ("Conv", [(2, 4, 9), (3, 4, 9)], {"kernel_shape": [9]}),
    ("ConvTranspose", [A, (4, 3, 3, 2), (6,)],
     {"group": 2, "strides": [2, 3], "dilations": [2, 1], "pads": [1, 0, 2, 1],
      "output_padding": [1, 2]}),
    *((op, [A], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 0, 1], "ceil_mode": c})
      for op in ("AveragePool", "MaxPool") for c in (0, 1)),
    ("BatchNormalization", [A, (4,), (4,), (4,), (4,)], {}),
    ("InstanceNormalization", [A, (4,), (4,)], {"epsilon": 1e-6}),
    ("LayerNormalization", [A, (6, 5), (6, 5)], {"axis": -2}),
    ("Shape", [A], {"start": 1, "end": -1}),
    ("Constant", [], {"value": numpy_helper.from_array(TEN)}),
    ("Constant", [], {"value_ints": [1, 2]}),
    ("Constant", [], {"value_float": 0.5}),
    ("ConstantOfShape", [ints(2, 3)], {}),
    ("ConstantOfShape", [ints(2)], {"value": numpy_helper.from_array(ints(1))}),
    ("Range", [np.array(2), np.array(11), np.array(3)], {}),
    ("Range", [np.array(9), np.array(-1), np.array(-2)], {}),
    ("Reshape", [A, ints(0, -1, 5)], {}),
    ("Reshape", [A, ints(2, 4, 30)], {"allowzero": 1}),
    ("Flatten", [A], {"axis": 2}),
    ("Squeeze", [(2, 1, 3, 1), ints(-1, 1)], {}),
    ("Unsqueeze", [(2, 3), ints(-1, 1)], {}),
    ("Transpose", [A], {"perm": [0, 3, 1, 2]}),
    ("Transpose", [A], {}),
    ("Concat", [A, (2, 1, 6, 5), A], {"axis": -3}),
    ("Split", [A, ints(1, 3)], {"axis": 1, "outputs": 2}),
    ("Split", [A], {"axis": -1, "num_outputs": 3, "outputs": 3}),
    ("Slice", [A, ints(1, -3), ints(2**62, -1), ints(1, 2)], {}),
    ("Slice", [A, ints(-1, 0), ints(-(2**62), 5), ints(2, 3), ints(-2, 2)], {}),
    ("Gather", [A, np.array([[0, 1, 5]])], {"axis": 2}),
    ("Expand", [(4, 1, 5), ints(2, 1, 6, 1)], {}),
    ("Tile", [A, ints(1, 2, 3, 1)], {}),
    ("Pad", [A, ints(0, 0, 1, 2, 0, 0, 3, -1)], {}),
    ("Pad", [A, ints(1, 2, 3, 4), floats(0).reshape(()), ints(-1, 2)], {"mode": "constant"}),
    ("Resize", [A, "", floats(1, 1, 2, 2)], {"mode": "nearest"}),
    ("Resize", [A, "", floats(1, 1, 0.7, 1.3)], {"mode": "linear"}),
    ("Resize", [A, floats(), "", ints(2, 4, 9, 3)], {"mode": "cubic"}),
    ("DepthToSpace", [A], {"blocksize": 2}),
    ("SpaceToDepth", [(2, 4, 6, 8)], {"blocksize": 2}),
    *((op, [A, ints(-1, 1)], {"keepdims": k}) for k in (0, 1) for op in (
        "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
        "ReduceSumSquare",
    )),
    ("ReduceMean", [A], {}),
]  # fmt: skip
SINCE = {"Gelu": 20}  # others: opset 18


def one_node(op: str, takes: list[Any], attributes: dict[str, Any]) -> onnx.ModelProto:
    """A model of one node; its first output is called prediction."""
    names, inputs, constants = [], [], []
    for i, given in enumerate(takes):
        names.append(f"in{i}" if isinstance(given, tuple | np.ndarray) else "")
        if isinstance(given, tuple):
            inputs.append(helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, given))
        elif names[-1]:
            constants.append(numpy_helper.from_array(given, names[-1]))
    attributes = dict(attributes)
    outputs = ["prediction", *(f"out{i}" for i in range(1, attributes.pop("outputs", 1)))]
    node = helper.make_node(op, names, outputs, name="it", **attributes)
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph([node], "one", inputs, results, constants)
    opset = [helper.make_opsetid("", SINCE.get(op, 18))]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    for name, (dtype, shape) in at_batch(model, 1).items():  # the reader wants typed outputs
        number = next(n for n, (text, _) in DTYPES.items() if text == dtype)
        value = next(v for v in model.graph.output if v.name == name)
        value.CopyFrom(helper.make_tensor_value_info(name, number, shape))
    return model


@pytest.mark.parametrize(
    ("op", "takes", "attributes"), OPERATORS, ids=[f"{i}-{o[0]}" for i, o in enumerate(OPERATORS)]
)
def test_rule_against_onnx(op: str, takes: list[Any], attributes: dict[str, Any]) -> None:
    compare(one_node(op, takes, attributes))


def test_every_rule_is_tested() -> None:
    x, scale = Value("float32", A), Value("float32", (5,))
    by_hand = {  # onnx has no shapes for the first; the others are of opsets 23 and 24
        "GroupNormalization": RULES["GroupNormalization"](x, scale, scale, num_groups=2),
        "RMSNormalization": RULES["RMSNormalization"](x, scale),
        "Swish": RULES["Swish"](x, alpha=1.0),
    }
    assert set(by_hand.values()) == {x}
    assert set(RULES) - {op for op, _, _ in OPERATORS} == set(by_hand)


def test_numbers_are_followed_through_shapes() -> None:
    """Shape, Gather, Slice, Concat, Cast, Squeeze, Unsqueeze, Reshape: what exporters compute."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "two"], ["h"], axis=0),
        helper.make_node("Unsqueeze", ["h", "zero"], ["h1"]),
        helper.make_node("Slice", ["s", "one", "zero", "zero", "minus"], ["channel"]),
        helper.make_node("Squeeze", ["channel", "zero"], ["c0"]),
        helper.make_node("Reshape", ["c0", "one"], ["c1"]),
        helper.make_node("Cast", ["c1"], ["c2"], to=TensorProto.INT32),
        helper.make_node("Cast", ["c2"], ["c3"], to=TensorProto.INT64),
        helper.make_node("Concat", ["h1", "c3", "minus"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["prediction"]),
    ]
    constants = {"two": np.array(2), "zero": ints(0), "one": ints(1), "minus": ints(-1)}
    graph = helper.make_graph(
        nodes,
        "numbers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, A)],
        [helper.make_tensor_value_info("prediction", TensorProto.FLOAT, (6, 4, 10))],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    values, _ = infer_shapes(read_model(model.SerializeToString()))
    assert values["target"].numbers == (6, 4, -1)
    assert values["prediction"].shape == (6, 4, 10)


def test_peak_of_live_bytes() -> None:
    """At its widest c2 and c3, each 4 channels of 256 bytes, beside t and label of 8 bytes."""
    assert check_model(tiny_model().SerializeToString(), TINY) == 8 + 8 + 2 * 4 * 256


def test_sizes_that_runtimes_round_differently_are_refused() -> None:
    """0.7 x 10: 7 in float32 (ONNX Runtime), 6 in float64 (onnx)."""
    model = one_node("Resize", [(1, 1, 10, 10), "", floats(1, 1, 0.7, 1)], {"mode": "linear"})
    with pytest.raises(BundleError, match="runtimes round to different sizes"):
        infer_shapes(read_model(model.SerializeToString()))


# The reader


@pytest.mark.parametrize("model", ["built-in", "tiny"])
def test_reader_against_protobuf(model: str) -> None:
    proto = onnx.load(BUILT_IN / "unet.onnx") if model == "built-in" else tiny_model()
    data = proto.SerializeToString()
    read = read_model(data)
    assert read.ir_version == proto.ir_version
    assert read.opsets == tuple((o.domain, o.version) for o in proto.opset_import)
    assert read.properties == {p.key: p.value for p in proto.metadata_props}
    assert (read.functions, read.training_info, read.sparse_initializers) == (0, 0, 0)
    for ours, theirs in zip(read.nodes, proto.graph.node, strict=True):
        assert (ours.name, ours.operator, ours.domain, ours.subgraph) == (
            theirs.name, theirs.op_type, theirs.domain, "",
        )  # fmt: skip
        assert (list(ours.inputs), list(ours.outputs)) == (theirs.input, theirs.output)
        for attribute in theirs.attribute:
            value = helper.get_attribute_value(attribute)
            got = ours.attributes[attribute.name]
            value = value.decode() if isinstance(value, bytes) else value
            assert (list(got) if isinstance(got, tuple) else got) == value
    for ours, theirs in zip(read.initializers, proto.graph.initializer, strict=True):
        array = numpy_helper.to_array(theirs)
        assert (ours.name, ours.dtype, ours.dims) == (theirs.name, str(array.dtype), array.shape)
        assert not ours.external
        (start, end) = ours.spans[0]
        assert data[start:end] == array.tobytes()
    assert [v.name for v in read.inputs] == [v.name for v in proto.graph.input]
    assert [v.dims for v in read.outputs] == [("batch", *read.outputs[0].dims[1:])]


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.int32, np.int8, np.float16, bool])
@pytest.mark.parametrize("raw", [True, False])
def test_reader_takes_every_way_to_hold_numbers(dtype: type, raw: bool) -> None:
    array = np.array([[0, 1], [1, 0]], dtype)
    if dtype in (np.float32, np.int64):
        array[0, 0] = -5
    number = helper.np_dtype_to_tensor_dtype(array.dtype)
    values = array.tobytes() if raw else array.flatten().tolist()
    tensor = helper.make_tensor("w", number, array.shape, values, raw=raw)
    model = tiny_model()
    model.graph.initializer.append(tensor)
    data = model.SerializeToString()
    read = read_model(data).initializers[-1]
    assert (read.name, read.dtype, read.dims) == ("w", array.dtype.name, (2, 2))
    if read.dtype in ("float32", "int32", "int64"):
        assert read.read(data) == tuple(array.flatten().tolist())


def test_unpacked_numbers() -> None:
    """proto2 writes `dims` number by number; a packed run of them means the same."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    tensor = field(1, bytes([2, 3])) + bytes([2 << 3, TensorProto.INT8]) + field(9, bytes(6))
    data = bytes([1 << 3, 10]) + field(7, field(5, tensor))
    assert read_model(data).initializers[0].dims == (2, 3)
