"""A channel's scale and shift as one node, against ONNX Runtime on the graph as it was."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper

from ddpm_edge import Bundle
from ddpm_edge.export.channel_scales import join_scales
from ddpm_edge.runtimes.onnx_runtime import OnnxRuntimeEngine

C = 6
RNG = np.random.default_rng(0)
SCALE, SHIFT = RNG.standard_normal((2, C)).astype(np.float32)


def graph(nodes, **constants):
    """A model of these nodes from x (batch, C, 4, 4) to prediction."""
    shape = ["batch", C, 4, 4]
    return helper.make_model(
        helper.make_graph(
            [helper.make_node(op, inputs, [output]) for op, inputs, output in nodes],
            "test",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("prediction", TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(np.asarray(a, np.float32), n) for n, a in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )


def operators(model):
    return [node.op_type for node in model.graph.node]


def answer(model, x):
    with OnnxRuntimeEngine(model.SerializeToString(), "cpu", optimize=False) as engine:
        return engine({"x": x})["prediction"]


AFFINE = [("Mul", ["x", "a"], "y"), ("Add", ["y", "b"], "prediction")]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (SCALE.reshape(C, 1, 1), SHIFT.reshape(C, 1, 1)),
        (SCALE.reshape(1, C, 1, 1), SHIFT.reshape(C, 1, 1)),
        (SCALE[:1], SHIFT.reshape(C, 1, 1)),
    ],
)
def test_one_node_gives_the_same(a, b) -> None:
    before = graph(AFFINE, a=a, b=b)
    after = join_scales(before)
    assert operators(after) == ["BatchNormalization"]
    onnx.checker.check_model(after, full_check=True)
    x = RNG.standard_normal((3, C, 4, 4)).astype(np.float32)
    # two roundings before and about four after, of values below 16: half a unit there is 5e-7
    assert np.abs(answer(after, x) - answer(before, x)).max() < 3e-6
    assert operators(before) == ["Mul", "Add"]  # left as it was


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        (AFFINE, {"a": np.ones((1, 4)), "b": np.ones((C, 1, 1))}),  # one a column
        (AFFINE, {"a": np.ones((C, 1, 1)), "b": np.ones((C, 4, 4))}),  # one a pixel
        (AFFINE, {"a": np.ones((C, 1, 1)), "b": np.ones((1, 4))}),
        ([("Mul", ["x", "x"], "y"), ("Add", ["y", "b"], "prediction")], {"b": SHIFT[:1]}),
        (
            [("Mul", ["x", "a"], "y"), ("Add", ["y", "b"], "z"), ("Add", ["y", "z"], "prediction")],
            {"a": SCALE[:1], "b": SHIFT[:1]},  # the product has another user
        ),
        ([("Mul", ["x", "a"], "y"), ("Sub", ["y", "b"], "prediction")], {"a": [2], "b": [1]}),
    ],
)
def test_what_is_no_scale_and_shift_of_channels_stays(nodes, constants) -> None:
    model = graph(nodes, **constants)
    assert operators(join_scales(model)) == operators(model)


def test_every_norm_of_the_built_in_model_is_joined() -> None:
    kinds = operators(onnx.load_from_string(Bundle.open().model()[1]))
    assert kinds.count("BatchNormalization") == kinds.count("InstanceNormalization") == 27
    assert kinds.count("Mul") == 25 + 1 + 4  # SiLU's, the time's angle, the attentions' scales
