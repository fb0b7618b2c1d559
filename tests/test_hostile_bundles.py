"""Bundles made to harm or to mislead: each is a BundleError, cheaply, and no runtime is asked."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY, rewrite, tiny_bundle, tiny_model

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper

from ddpm_edge import Bundle, Generator
from ddpm_edge.errors import BundleError
from ddpm_edge.manifest import MANIFEST
from ddpm_edge.onnx_check import check_model
from ddpm_edge.onnx_reader import read_model

PEAK = 8 << 20  # bytes that refusing a tiny bundle may take, whatever it claims


@pytest.fixture(autouse=True)
def no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking a runtime fails the test."""
    monkeypatch.setattr("ddpm_edge.generator.open_engine", lambda *_, **__: pytest.fail("parsed"))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


@pytest.fixture(scope="module", autouse=True)
def loaded_modules(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Imports are not what a bundle costs."""
    Bundle.open(tiny_bundle(tmp_path_factory.mktemp("warm") / "b")).model()


def refused(path: Path, peak: int = PEAK) -> str:
    """The message of the BundleError that loading gives."""
    tracemalloc.start()
    try:
        with pytest.raises(BundleError) as caught:
            Generator.load(path)
        assert tracemalloc.get_traced_memory()[1] < peak
    finally:
        tracemalloc.stop()
    return str(caught.value)


def test_the_tiny_bundle_itself_is_fine(tiny: Path) -> None:
    assert Bundle.open(tiny).model()[1] == (tiny / "unet.onnx").read_bytes()


# Damage


@pytest.mark.parametrize("name", [MANIFEST, "unet.onnx", "reference.npz"])
def test_truncated_anywhere(tiny: Path, name: str) -> None:
    data = (tiny / name).read_bytes()
    for part in range(64):
        (tiny / name).write_bytes(data[: len(data) * part // 64])
        with pytest.raises(BundleError):
            Generator.load(tiny)


def test_truncated_anywhere_with_the_right_hash(tiny: Path) -> None:
    data = (tiny / "unet.onnx").read_bytes()
    for part in range(64):
        (tiny / "unet.onnx").write_bytes(data[: len(data) * part // 64])
        rewrite(tiny, rehash=True)
        with pytest.raises(BundleError, match=r"not a valid ONNX model|the model is refused"):
            Generator.load(tiny)


def test_a_thousand_flipped_bits(tiny: Path) -> None:
    data = bytearray((tiny / "unet.onnx").read_bytes())
    rng = random.Random(0)
    for _ in range(1000):
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        (tiny / "unet.onnx").write_bytes(data)
        with pytest.raises(BundleError, match="SHA-256"):
            Generator.load(tiny)
        data[bit // 8] ^= 1 << bit % 8


def test_a_thousand_flipped_bits_of_the_structure() -> None:
    """Everything but the weights: refused, or well-formed in protobuf's eyes too."""
    data = bytearray(tiny_model().SerializeToString())
    weights = {
        i
        for tensor in read_model(bytes(data)).initializers
        if tensor.dtype == "float32"
        for i in range(*tensor.spans[0])
    }
    structure = [i for i in range(len(data)) if i not in weights]
    rng = random.Random(0)
    refused = 0
    for _ in range(1000):
        i, bit = rng.choice(structure), 1 << rng.randrange(8)
        data[i] ^= bit
        try:
            check_model(bytes(data), TINY)
        except BundleError:
            refused += 1
        else:
            theirs, ours = onnx.load_from_string(bytes(data)), read_model(bytes(data))
            assert [n.op_type for n in theirs.graph.node] == [n.operator for n in ours.nodes]
            assert [tuple(t.dims) for t in theirs.graph.initializer] == [
                t.dims for t in ours.initializers
            ]
            onnx.shape_inference.infer_shapes(theirs, strict_mode=True)
        data[i] ^= bit
    assert 700 < refused < 1000  # the others changed names, an epsilon, a label's table, ...


# Models that are well-formed and not what they should be


def model(
    *nodes: onnx.NodeProto,
    add: Callable[[onnx.ModelProto], object] = lambda _: None,
    **constants: Any,
) -> onnx.ModelProto:
    """The tiny model with these nodes in front, and these constants."""
    proto = tiny_model()
    own = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *own])
    for name, array in constants.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    add(proto)
    return proto


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def node(op: str, takes: str, gives: str = "new", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, takes.split(), gives.split(), **attributes)


def changed(change: Callable[[onnx.ModelProto], object]) -> Callable[[], onnx.ModelProto]:
    return lambda: model(add=change)


def subgraph(name: str = "body") -> onnx.GraphProto:
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1])
    return helper.make_graph([node("Identity", "x", "out")], name, [], [out])


def external(location: str) -> Callable[[], onnx.ModelProto]:
    def change(proto: onnx.ModelProto) -> None:
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return changed(change)


def external_in_attribute() -> onnx.ModelProto:
    tensor = TensorProto(dims=[4], data_type=1, name="v", data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="reference.npz")
    return model(node("Constant", "", value=tensor))


def doubling(times: int) -> list[onnx.NodeProto]:
    return [node("Concat", f"d{i} d{i}", f"d{i + 1}", axis=0) for i in range(times)]


def with_initializer(**fields: Any) -> Callable[[], onnx.ModelProto]:
    return changed(lambda m: m.graph.initializer.append(TensorProto(name="w", **fields)))


def typed(which: str, name: str, elem: int, *shape: int | str) -> Callable[[], onnx.ModelProto]:
    """The declared type of the input or output of this name is another one."""

    def change(proto: onnx.ModelProto) -> None:
        value = next(v for v in getattr(proto.graph, which) if v.name == name)
        value.CopyFrom(helper.make_tensor_value_info(name, elem, shape))

    return changed(change)


def renamed(which: str, name: str) -> Callable[[], onnx.ModelProto]:
    def change(proto: onnx.ModelProto) -> None:
        getattr(proto.graph, which)[0].name = name

    return changed(change)


def opset(*versions: tuple[str, int]) -> Callable[[], onnx.ModelProto]:
    def change(proto: onnx.ModelProto) -> None:
        del proto.opset_import[:]
        proto.opset_import.extend(helper.make_opsetid(*version) for version in versions)

    return changed(change)


def swapped(proto: onnx.ModelProto) -> None:
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))


def set_field(thing: str, field: str, value: Any) -> Callable[[], onnx.ModelProto]:
    """A field of the first thing of the graph, or of the model."""

    def change(proto: onnx.ModelProto) -> None:
        owner = getattr(proto.graph, thing)[0] if thing else proto
        setattr(owner, field, value)

    return changed(change)


F32, I64 = TensorProto.FLOAT, TensorProto.INT64
GIB = 1 << 30
ONE = np.ones(1, np.float32)
HOSTILE: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    # Memory
    "ConstantOfShape of 4 GB": (
        lambda: model(node("ConstantOfShape", "s"), s=ints(10**9)), "has shape (1000000000,)"),
    "ConstantOfShape beyond int64": (
        lambda: model(node("ConstantOfShape", "s"), s=ints(*[2**62] * 8)), "has shape"),
    "ConstantOfShape of computed sizes": (
        lambda: model(node("ConstantOfShape", "t")), "computed while running"),
    "Concat doubled 40 times": (
        lambda: model(*doubling(40), d0=np.zeros(8, np.float32)), "node '' (Concat -> d26)"),
    "outer product by broadcasting": (
        lambda: model(node("Add", "a b"), a=np.zeros((30_000, 1), np.float32),
                      b=np.zeros((1, 30_000), np.float32)), "has shape (30000, 30000)"),
    "outer product of MatMul": (
        lambda: model(node("MatMul", "a b"), a=np.zeros((30_000, 1), np.float32),
                      b=np.zeros((1, 30_000), np.float32)), "has shape (30000, 30000)"),
    "Expand": (lambda: model(node("Expand", "x s"), s=ints(1, 1 << 30, 8, 8)), "has shape (1, 107"),
    "Tile": (lambda: model(node("Tile", "x s"), s=ints(1, 1 << 30, 1, 1)), "has shape (1, 107"),
    "Tile beyond int64": (
        lambda: model(node("Tile", "x s"), s=ints(*[2**62] * 4)), "has shape (46116"),
    "Pad": (
        lambda: model(node("Pad", "x s"), s=ints(0, 0, 0, 0, 0, 0, 1 << 40, 0)), "has shape (1, 1"),
    "Resize by scales": (
        lambda: model(helper.make_node("Resize", ["x", "", "s"], ["new"]),
                      s=np.array([1, 1, 3e38, 1], np.float32)), "scales (1.0, 1.0, 3"),
    "Resize by NaN": (
        lambda: model(helper.make_node("Resize", ["x", "", "s"], ["new"]),
                      s=np.array([1, 1, np.nan, 1], np.float32)), "scales (1.0, 1.0, nan"),
    "Resize to sizes": (
        lambda: model(helper.make_node("Resize", ["x", "", "", "s"], ["new"]),
                      s=ints(1, 1, 1 << 20, 1 << 20)), "has shape (1, 1, 1048576"),
    "Range": (
        lambda: model(node("Range", "a b c"), a=np.array(0), b=np.array(2**62), c=np.array(1)),
        "has shape (46116"),
    "Range of more than an index can count": (
        lambda: model(node("Range", "a b c"), a=np.array(-(2**62)), b=np.array(2**62),
                      c=np.array(1)), "does not fit its operator"),
    "Range of computed numbers": (
        lambda: model(node("ReduceMax", "t", "m", keepdims=0), node("Range", "a m c"),
                      a=np.array(0), c=np.array(1)), "computed while running"),
    "ConvTranspose of a huge stride": (
        lambda: model(node("ConvTranspose", "x w", strides=[1 << 20] * 2),
                      w=np.zeros((1, 1, 3, 3), np.float32)), "has shape (1, 1, 7340035"),
    "Conv of huge pads": (
        lambda: model(node("Conv", "x w1", pads=[1 << 30] * 4, strides=[1 << 30] * 2)),
        "wider than the kernel"),
    "Split in 2^40 parts": (
        lambda: model(node("Split", "x", "a b", axis=3, num_outputs=1 << 40)), "parts of 8"),
    "many large tensors at once": (
        lambda: model(*(node("Expand", "one s", f"e{i}") for i in range(5)),
                      node("Sum", "e0 e1 e2 e3 e4"), one=np.zeros(1, np.float32),
                      s=ints(1 << 28)), "bytes at once"),
    "hours of arithmetic": (
        lambda: model(node("Expand", "one s", "a"), node("MatMul", "a a", "b"),
                      *(node("MatMul", "b a", f"b{i}") for i in range(40)),
                      one=np.zeros(1, np.float32), s=ints(16_000, 16_000)), "multiply-adds"),
    "a tensor that grows as batch^2": (
        lambda: model(node("Concat", "s s", "ss", axis=0), node("Shape", "t", "s"),
                      node("Expand", "one ss"), one=np.zeros(1, np.float32),
                      add=lambda m: m.graph.node.insert(0, m.graph.node.pop(1))),
        "grow no faster than the batch"),
    "a tensor that grows as (batch / 7)^4": (
        lambda: model(node("Slice", "t zero end zero seven", "few"), node("Shape", "few", "s"),
                      node("Concat", "s s s s", "ss", axis=0), node("Expand", "one ss"),
                      one=np.zeros(1, np.float32), zero=ints(0), end=ints(2**62), seven=ints(7)),
        "grow no faster than the batch"),
    "an empty tensor": (
        lambda: model(node("Slice", "x one one"), one=ints(1)), "none empty"),
    "nine axes": (
        lambda: model(node("Unsqueeze", "x five"), five=ints(0, 1, 2, 3, 4)), "at most 8 axes"),
    # Control flow, other code, other files
    "endless Loop": (
        lambda: model(helper.make_node("Loop", ["", "true"], ["new"], body=subgraph()),
                      true=np.array(True)), "ai.onnx.Loop with a graph in its body"),
    "If": (
        lambda: model(node("If", "yes", then_branch=subgraph(), else_branch=subgraph()),
                      yes=np.array(True)), "operator ai.onnx.If with a graph in its"),
    "Scan": (
        lambda: model(node("Scan", "x", body=subgraph(), num_scan_inputs=1)), "ai.onnx.Scan"),
    "a graph in an attribute of another operator": (
        lambda: model(node("Relu", "x", body=subgraph())), "ai.onnx.Relu with a graph"),
    "Loop without a graph": (lambda: model(node("Loop", "x")), "operator ai.onnx.Loop"),
    "operator that is not listed": (lambda: model(node("NonZero", "x")), "operator ai.onnx.NonZ"),
    "custom domain": (
        lambda: model(node("Relu", "x", domain="evil")), "operator evil.Relu"),
    "another domain imported": (
        opset(("", 18), ("com.microsoft", 1)), "operator sets (('', 18), ('com.microsoft', 1))"),
    "both names of the domain": (opset(("", 18), ("ai.onnx", 18)), "operator sets"),
    "no operator set": (opset(), "operator sets ()"),
    "an old operator set": (opset(("", 12)), "version 13..26"),
    "a newer operator set": (opset(("", 27)), "version 13..26"),
    "an old IR version": (set_field("", "ir_version", 3), "IR version 3"),
    "a newer IR version": (set_field("", "ir_version", 99), "IR version 99"),
    "local function": (
        changed(lambda m: m.functions.append(helper.make_function(
            "own", "F", ["a"], ["b"], [node("Relu", "a", "b")], [helper.make_opsetid("", 18)]))),
        "1 functions"),
    "training_info": (
        changed(lambda m: m.training_info.add()), "1 training_info"),
    "sparse initializer": (
        changed(lambda m: m.graph.sparse_initializer.add(dims=[4])), "1 sparse_initializers"),
    "external data in the parent": (external("../secret"), "outside the file"),
    "external data by absolute path": (external("/etc/passwd"), "outside the file"),
    "external data in a listed file": (external("reference.npz"), "outside the file"),
    "external data of an attribute": (external_in_attribute, "outside the file"),
    "attribute of a function's caller": (
        lambda: model(onnx.NodeProto(
            op_type="Relu", input=["x"], output=["new"],
            attribute=[onnx.AttributeProto(name="a", ref_attr_name="b", type=1)])),
        "field 21"),
    "sparse tensor in an attribute": (
        lambda: model(node("Constant", "", sparse_value=onnx.SparseTensorProto())), "field 22"),
    "overloaded operator": (
        lambda: model(node("Relu", "x", overload="mine")), "field 8"),
    # Initializers
    "initializer of 2^31 x 2^31": (
        with_initializer(dims=[2**31, 2**31], data_type=F32), "expected 18446744073709551616"),
    "initializer of 0 x 2^62": (
        with_initializer(dims=[2**62, 2**62, 2], data_type=F32, raw_data=b"1234"), "has 4 bytes"),
    "negative dims": (with_initializer(dims=[-1, -4], data_type=F32, raw_data=bytes(16)), "none n"),
    "too many dims": (with_initializer(dims=[1] * 5000, data_type=F32), "expected 0..8"),
    "too few bytes": (with_initializer(dims=[4], data_type=F32, raw_data=bytes(15)), "15 bytes"),
    "too many bytes": (with_initializer(dims=[4], data_type=F32, raw_data=bytes(20)), "20 bytes"),
    "too few numbers": (with_initializer(dims=[4], data_type=I64, int64_data=[1] * 3), "24 bytes"),
    "bytes and numbers": (
        with_initializer(dims=[1], data_type=F32, float_data=[1], raw_data=bytes(4)), "its data i"),
    "numbers of another type": (
        with_initializer(dims=[1], data_type=I64, int32_data=[1]), "its data in ['int32_data']"),
    "texts": (with_initializer(dims=[1], data_type=8, string_data=[b"a"]), "field 6"),
    "complex numbers": (with_initializer(dims=[1], data_type=14, raw_data=bytes(8)), "data type 1"),
    "a segment of a tensor": (
        with_initializer(dims=[1], data_type=1, raw_data=bytes(4),
                         segment=TensorProto.Segment(begin=0, end=2**40)), "field 3"),
    # What the manifest says
    "another name of x": (renamed("input", "image"), "inputs image float32"),
    "another name of the output": (renamed("output", "c4"), "outputs c4 float32"),
    "x of another size": (typed("input", "x", F32, "b", 1, 8, 9), "x float32 (batch, 1, 8, 9)"),
    "x of another rank": (typed("input", "x", F32, "b", 64), "x float32 (batch, 64)"),
    "x of no rank": (typed("input", "x", F32), "inputs x float32 ()"),
    "x of another type": (typed("input", "x", 10, "b", 1, 8, 8), "x float16"),
    "t of another type": (typed("input", "t", F32, "b"), "t float32 (batch)"),
    "t for one sample": (typed("input", "t", I64, 1), "t int64 (1)"),
    "x for two samples": (typed("input", "x", F32, 2, 1, 8, 8), "x float32 (2, 1, 8, 8)"),
    "x with any height": (typed("input", "x", F32, "b", 1, "h", 8), "x float32 (batch, 1, h, 8)"),
    "output of another type": (typed("output", "prediction", I64, "b", 1, 8, 8), "prediction int6"),
    "output of another size": (typed("output", "prediction", F32, "b", 2, 8, 8), "(batch, 2, 8, 8"),
    "output that is declared right and is not": (
        changed(lambda m: m.graph.node[-1].input.__setitem__(0, "c3")), "(61, 4, 8, 8) for 61"),
    "no label": (changed(lambda m: m.graph.input.pop()), "expected x float32 (batch, 1, 8, 8), t "),
    "one input more": (
        changed(lambda m: m.graph.input.append(helper.make_tensor_value_info("y", F32, ["b"]))),
        "y float32"),
    "x twice": (
        changed(lambda m: m.graph.input.__getitem__(1).CopyFrom(m.graph.input[0])), "inputs x"),
    "two outputs": (
        changed(lambda m: m.graph.output.append(helper.make_tensor_value_info("c4", F32, ["b"]))),
        "outputs prediction"),
    "a sequence": (
        changed(lambda m: m.graph.input[0].CopyFrom(
            helper.make_tensor_sequence_value_info("x", F32, ["b"]))), "field 4"),
    "one sample only, by a constant": (
        lambda: model(node("Reshape", "x one", "y"), one=ints(1, 1, 8, 8)), "as (1, 1, 8, 8)"),
    "another prediction": (
        changed(lambda m: m.metadata_props.add(key="prediction", value="v")), "prediction v; exp"),
    "another timestep": (
        changed(lambda m: m.metadata_props.add(key="timestep_offset", value="0")), "offset 0; e"),
    "a property twice": (
        changed(lambda m: [m.metadata_props.add(key="a", value=v) for v in "12"]), "'a' comes tw"),
    # Names and order
    "a cycle": (
        lambda: model(node("Relu", "b", "a"), node("Relu", "a", "b")), "before it is defined"),
    "a node of its own output": (lambda: model(node("Relu", "a", "a")), "before it is defined"),
    "nodes in reverse": (changed(swapped), "before it is defined"),
    "an input that nothing gives": (lambda: model(node("Relu", "nothing")), "uses 'nothing'"),
    "a name given twice": (
        lambda: model(node("Relu", "x"), node("Relu", "x")), "'new' has no name or is defined tw"),
    "an output over an initializer": (lambda: model(node("Relu", "x", "w1")), "'w1' has no name"),
    "an output over an input": (lambda: model(node("Relu", "x", "t")), "'t' has no name"),
    "an output without a name": (
        lambda: model(helper.make_node("Relu", ["x"], [""])), "'' has no name"),
    "two initializers of one name": (lambda: model(w1=np.zeros(1)), "'w1' has no name or is"),
    "an initializer over an input": (lambda: model(x=np.zeros(1)), "'x' has no name or is"),
    "a node that gives the wrong number": (
        lambda: model(node("Relu", "x", "a b")), "has 2 outputs"),
    "no node": (changed(lambda m: m.graph.ClearField("node")), "no node gives prediction"),
    "nodes without end": (
        lambda: model(*(node("Relu", "x", str(i)) for i in range(1000))), "1014 nodes"),
    "ports without end": (
        lambda: model(node("Sum", "x " * 2000)), "more than 1024 inputs"),
    # Operators used wrongly
    "an attribute that the operator has not": (
        lambda: model(node("Conv", "x w1", pads=[1] * 4, sizes=[1 << 40])), "argument 'sizes'"),
    "an attribute twice": (
        lambda: model(onnx.NodeProto(
            op_type="Relu", input=["x"], output=["new"],
            attribute=[helper.make_attribute("alpha", 1.0)] * 2)), "'alpha' comes twice"),
    "an attribute of another type": (
        lambda: model(node("AveragePool", "x", kernel_shape=[2.0, 2.0])), "none empty"),
    "an attribute that says it is a number": (
        lambda: model(node("Constant", "", value=5)), "a value that is no tensor"),
    "an attribute of two kinds": (
        lambda: model(onnx.NodeProto(
            op_type="Elu", input=["x"], output=["new"],
            attribute=[onnx.AttributeProto(name="alpha", f=1, i=1, type=1)])), "holds ['f', 'i']"),
    "too many inputs": (lambda: model(node("Relu", "x x")), "does not fit its operator"),
    "a needed input left out": (
        lambda: model(helper.make_node("Conv", ["x", ""], ["new"])), "does not fit its operator"),
    "the only input left out": (
        lambda: model(helper.make_node("Identity", [""], ["new"])), "does not fit its operator"),
    "numbers that are a text": (
        lambda: model(node("Constant", "", value_ints="NOTSET")), "value_ints of another type"),
    "whole numbers as logical": (lambda: model(node("Not", "t")), "not bool"),
    "auto_pad": (
        lambda: model(node("Conv", "x w1", auto_pad="SAME_UPPER")), "auto_pad other than NOTSET"),
    "a stride of 0": (lambda: model(node("Conv", "x w1", strides=[0, 0])), "stride or dilation b"),
    "a step of 0": (
        lambda: model(node("Slice", "x zero one zero zero"), zero=ints(0), one=ints(1)), "step"),
    "an axis of 99": (lambda: model(node("Softmax", "x", axis=99)), "out of range"),
    "a Reshape to other numbers": (
        lambda: model(node("Reshape", "x s"), s=ints(-2, -32)), "as (-2, -32)"),
    "a Reshape with two unknown": (
        lambda: model(node("Reshape", "x s"), s=ints(-1, -1)), "as (-1, -1)"),
    "a Reshape by an input": (
        lambda: model(node("Reshape", "x label")), "computed while running"),
    "types that differ": (lambda: model(node("Add", "x t")), "types float32, int64 differ"),
    # Quantisation: s is a scale, z a zero point, q what was quantised
    "quantised integers": (lambda: model(node("QuantizeLinear", "t s"), s=ONE), "int64 is not q"),
    "quantised to another kind": (
        lambda: model(node("QuantizeLinear", "x s z"), s=ONE, z=np.int32(0)), "of type int32"),
    "integers of 32 bits": (
        lambda: model(node("DequantizeLinear", "q s"), s=ONE, q=np.zeros(4, np.int32)),
        "integers of type int32"),
    "no integers": (lambda: model(node("DequantizeLinear", "x s"), s=ONE), "of type float32"),
    "a scale of no numbers": (
        lambda: model(node("QuantizeLinear", "x s"), s=np.zeros(0, np.float32)), "scale (0,) for"),
    "a scale of no float": (
        lambda: model(node("QuantizeLinear", "x s"), s=np.int32(1)), "scale of type int32"),
    "scales for another axis": (
        lambda: model(node("QuantizeLinear", "x s", axis=1), s=ONE.repeat(8)), "scale (8,) for"),
    "scales for no axis": (
        lambda: model(node("QuantizeLinear", "x s", axis=4), s=ONE.repeat(8)), "out of range"),
    "scales of two axes": (
        lambda: model(node("QuantizeLinear", "x s", axis=2), s=np.ones((8, 8), np.float32)),
        "scale (8, 8) for"),
    "blocks of scales": (
        lambda: model(node("QuantizeLinear", "x s", axis=2, block_size=4), s=ONE.repeat(2)),
        "block_size"),
    "zero points of another kind": (
        lambda: model(node("DequantizeLinear", "q s z"), s=ONE, q=np.zeros(4, np.int8),
                      z=np.zeros(1, np.uint8)), "zero point of type uint8 for int8"),
    "fewer zero points": (
        lambda: model(node("QuantizeLinear", "x s z", axis=2), s=ONE.repeat(8), z=np.int8(0)),
        "of different shapes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_model(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_edge.onnx_check.MAX_NODES", 1000)  # the real limit takes seconds
    make, message = HOSTILE[kind]
    data = make().SerializeToString()
    said = refused(tiny_bundle(tmp_path / "b", data), PEAK + 40 * len(data))
    assert message in said
    assert str(tmp_path) in said


def test_the_smallest_memory_bomb(tmp_path: Path) -> None:
    """144 bytes that take ONNX Runtime 4 GB."""
    shape = numpy_helper.from_array(ints(10**9), "s")
    out = helper.make_tensor_value_info("y", F32, None)
    graph = helper.make_graph([node("ConstantOfShape", "s", "y")], "g", [], [out], [shape])
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    assert len(data.SerializeToString()) < 144
    assert "inputs ; expected x" in refused(tiny_bundle(tmp_path / "b", data.SerializeToString()))


# Files that are not well-formed


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def nested(levels: int) -> bytes:
    """Graphs in attributes of nodes of graphs ..."""
    inner = b""
    for _ in range(levels):
        inner = field(1, field(5, field(1, b"g") + b"\xa0\x01\x05" + field(6, inner)))
    return field(7, inner)


MANY = 10_000
GOOD = tiny_model().SerializeToString()
MALFORMED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "IR version 0"),
    "zeros": (bytes(1000), "field 0"),
    "noise": (random.Random(0).randbytes(100_000), "not a valid ONNX model"),
    "text": (b"PK\x03\x04 not a model", "not a valid ONNX model"),
    "a model twice": (GOOD + GOOD, "comes twice"),
    "a second graph": (GOOD + field(7, b""), "graph comes twice"),
    "a second producer": (GOOD + field(2, b"a") + field(2, b"b"), "comes twice"),
    "bytes behind": (GOOD + bytes(2), "field 0"),
    "a field from the future": (GOOD + field(26, b""), "field 26"),
    "a group": (GOOD + b"\x0b\x0c", "wire type 3"),
    "a number of 64 bits": (b"\x09" + bytes(8), "wire type 1"),
    "ir_version as text": (field(1, b"abc"), "ir_version has wire type 2"),
    "graph as number": (b"\x38\x01", "graph has wire type 0"),
    "a number of 11 bytes": (b"\x08" + b"\x80" * 10 + b"\x01", "does not end"),
    "a number of 70 bits": (b"\x08" + b"\xff" * 9 + b"\x7f", "more bits"),
    "a number longer than needed": (b"\x08\x8a\x00", "more bits or bytes than it may"),
    "a number cut off": (b"\x08\xff", "does not end"),
    "a key cut off": (GOOD + b"\xff", "does not end"),
    "a length of 2^63": (b"\x3a" + b"\x80" * 9 + b"\x01" + GOOD, "ends 9223372036854"),
    "a length one too long": (varint(7 << 3 | 2) + varint(5) + b"1234", "ends 1 bytes behind"),
    "a name that is not UTF-8": (field(7, field(1, field(4, b"\xff\xfe"))), "not UTF-8"),
    "a name of a megabyte": (field(7, field(1, field(4, b"a" * 10**6))), "a text of 1000000 bytes"),
    "fields without end": (field(7, field(1, b"") * (MANY + 1)), "more than 10000 fields"),
    "inputs without end": (
        field(7, field(1, field(1, b"") * (MANY + 1))), "more than 10000 fields"),
    "numbers without end": (
        field(7, field(5, field(7, bytes(MANY + 1)))), "more than 10000 fields"),
    "dimensions without end": (
        field(7, field(5, field(1, bytes(1000)))), "expected 0..8"),
    "graphs nested 10,000 deep": (nested(5000), "IR version 0"),
    "floats of 3 bytes": (
        field(7, field(1, field(5, field(1, b"a") + b"\xa0\x01\x06" + field(7, b"123")))), "of fl"),
    "an attribute without a type": (field(7, field(1, field(5, field(1, b"a")))), "of type 0"),
    "a negative dimension": (
        field(7, field(11, field(2, field(1, b"\x08\x01" + field(2, field(1,
              b"\x08" + b"\xff" * 9 + b"\x01")))))), "a dimension of -1"),
    "a dimension with a size and a name": (
        field(7, field(11, field(2, field(1, b"\x08\x01" + field(2, field(1,
              b"\x08\x01" + field(2, b"n"))))))), "a dimension of 1, or"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_model(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_edge.onnx_reader.MAX_FIELDS", MANY)  # the real limit takes seconds
    data, message = MALFORMED[kind]
    said = refused(tiny_bundle(tmp_path / "b", data), PEAK + 4 * len(data))
    assert message in said


# Manifests and directories


def entry(**changes: Any) -> dict[str, Any]:
    return {"size": 1, "sha256": "0", **changes}


def listed(**changes: Any) -> dict[str, Any]:
    return {"unet.onnx": entry(**changes), "reference.npz": entry()}


MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"postinstall": "rm"}, "unknown field 'postinstall', expected format, name"),
    "unknown field of timestep": (
        {"timestep": {"offset": -1, "dtype": "int64", "scale": 2}}, "'timestep.scale'"),
    "unknown field of a variant": (
        {"variants": {"fp32": {"file": "unet.onnx", "code": "a.so"}}}, "'variants.fp32.code"),
    "unknown field of a file": ({"files": {"unet.onnx": entry(url="x")}}, "'files.unet.onnx.url'"),
    "unknown field of the schedule": (
        {"schedule": {"rule": "linear", "code": "x"}}, "has no code"),
    "unknown option of the plan": (
        {"plan": {"sampler": "ddim", "steps": 5, "code": "x"}}, "option of sampler 'ddim' must"),
    **{
        f"{corrections} corrections": (
            {"plan": {"sampler": "pc", "steps": 20, "corrections": corrections}}, "number <= 1000")
        for corrections in (2**62, 2**63 - 1, 10**12, 10**6)
    },
    "a million rows": (
        {"plan": {"sampler": "pc", "steps": 1000, "corrections": 1000}}, "more than 100000 rows"),
    "20,000 betas": (
        {"schedule": {"rule": "betas", "betas": [1e-5] * 20_000}}, "T = 20000; expected at most"),
    "a sampler with a long name": ({"plan": {"sampler": "x" * 1_000_000}}, "got 'xxx"),
    "timesteps that ascend": ({"plan": {"sampler": "ddim", "spacing": [1, 2]}}, "must descend"),
    "a clip that is a list": ({"plan": {"sampler": "ddim", "clip": [1.0]}}, "got [1.0]"),
    "a schedule of 10^12 steps": ({"schedule": {"rule": "linear", "T": 10**12}}, "T = 10000000000"),
    "a schedule of 10^300 steps": ({"schedule": {"rule": "constant", "T": 10**300}}, "at most 100"),
    "a plan of 10^12 steps": ({"plan": {"sampler": "ddim", "steps": 10**12}}, "must be in 1..1000"),
    "samples of 10^18 pixels": ({"sample_shape": [1, 10**9, 10**9]}, "expected x float32 (batch, "),
    "labels that the model has not": ({"class_names": [], "null_label": None}, "expected x float3"),
    "a file of 3 GB": ({"files": listed(size=3 << 30)}, "3221225472 bytes"),
    "a file of negative size": ({"files": listed(size=-1)}, "expected -1"),
    "a file of size true": ({"files": {"unet.onnx": entry(size=True)}}, "list of files is not"),
    "files as a list": ({"files": ["unet.onnx"]}, "list of files is not valid"),
    "a file as a text": ({"files": {"unet.onnx": "abc"}}, "list of files is not valid"),
    "a variant that is the manifest": (
        {"variants": {"fp32": {"file": MANIFEST}}}, "has no file in the list"),
    "a variant outside": ({"variants": {"fp32": {"file": "../x.onnx"}}}, "has no file in the list"),
    "timestep as a number": ({"timestep": 3}, "not valid"),
    "a variant as a text": ({"variants": {"fp32": "unet.onnx"}}, "not valid"),
    "nested lists": ({"training": json.loads("[" * 90 + "]" * 90)}, "not valid"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MANIFESTS)
def test_hostile_manifest(tiny: Path, kind: str) -> None:
    changes, message = MANIFESTS[kind]
    rewrite(tiny, **changes)
    assert message in refused(tiny)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\\b", "C:x", "x\0y", "a\nb",
     MANIFEST, "BUNDLE.JSON", "x" * 101, "ünet.onnx"],
)  # fmt: skip
def test_file_names(tiny: Path, name: str) -> None:
    files = json.loads((tiny / MANIFEST).read_text())["files"]
    rewrite(tiny, files=files | {name: entry()})
    assert "is not a plain file name" in refused(tiny)


def test_no_such_name_is_written(tmp_path: Path) -> None:
    from ddpm_edge.bundle import write_bundle

    with pytest.raises(BundleError, match="is not a plain file name"):
        write_bundle(tmp_path / "b", TINY, {"../x": b""})
    assert os.listdir(tmp_path) == []


TEXTS = {
    "duplicate key": ('{"format": 1, "format": 2}', "duplicate key 'format'"),
    "duplicate key inside": ('{"format": 1, "files": {"a": {}, "a": {}}}', "duplicate key 'a'"),
    "NaN": ('{"format": 1, "sample_shape": [1, NaN, 8]}', "NaN is not JSON"),
    "infinity": ('{"format": 1, "x": -1e999}', "out of range"),
    "5 MB": ("[" + " " * (5 << 20) + "]", "larger than"),
    "a number of a million digits": ('{"format": ' + "1" * 10**6 + "}", "not valid JSON"),
    "100,000 brackets": ("[" * 100_000, "not valid JSON"),
    "not UTF-8": (b'{"format": "\xff"}'.decode("latin-1"), "not valid JSON"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_hostile_manifest_text(tiny: Path, kind: str) -> None:
    text, message = TEXTS[kind]
    (tiny / MANIFEST).write_text(text, encoding="latin-1")
    assert message in refused(tiny, 4 * PEAK)


def links() -> Iterator[tuple[str, Callable[[Path, Path], object], str]]:
    yield "link to a file outside", lambda file, to: file.symlink_to(to), "is a link"
    yield "link to itself", lambda file, to: file.symlink_to(file.name), "is a link"
    yield "directory", lambda file, to: file.mkdir(), "not a plain file"
    yield "pipe", lambda file, to: os.mkfifo(file), "not a plain file"
    yield "other file by a hard link", lambda file, to: file.hardlink_to(to), "has 6 bytes"


@pytest.mark.parametrize(("make", "message"), [pytest.param(*k[1:], id=k[0]) for k in links()])
def test_what_a_file_may_not_be(
    tiny: Path, make: Callable[[Path, Path], object], message: str
) -> None:
    (tiny.parent / "secret").write_bytes(b"secret")
    (tiny / "unet.onnx").unlink()
    make(tiny / "unet.onnx", tiny.parent / "secret")
    assert message in refused(tiny)


@pytest.mark.parametrize("name", ["extra", ".hidden", "unet.onnx.data"])
def test_files_that_are_not_listed(tiny: Path, name: str) -> None:
    (tiny / name).write_bytes(b"")
    assert f"holds {name!r}" in refused(tiny)


def test_external_data_by_a_hard_link(tiny: Path) -> None:
    """A listed file that is another name of one outside; the model reads its weights from it."""
    (tiny.parent / "secret").write_bytes(bytes(144))
    (tiny / "weights").hardlink_to(tiny.parent / "secret")
    (tiny / "unet.onnx").write_bytes(external("weights")().SerializeToString())
    rewrite(tiny, rehash=True)
    assert "outside the file" in refused(tiny)


def test_another_model_of_another_size(tiny: Path) -> None:
    """An honest mistake: the manifest of one model, the file of another."""
    other = Bundle.open()
    (tiny / "unet.onnx").write_bytes(other.read("unet.onnx"))
    rewrite(tiny, rehash=True)
    said = refused(tiny, 100 << 20)
    assert "sample_shape [1, 28, 28]; expected [1, 8, 8], as the manifest says" in said
