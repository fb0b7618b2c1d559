"""What several test files use: small networks, and a way to edit a bundle.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddpm_edge import bundle, manifest
from ddpm_edge.runtimes import TensorSpec
from ddpm_edge.runtimes.base import check_inputs
from ddpm_edge.schedule import Schedule

if TYPE_CHECKING:
    import onnx


class ToyEngine:
    """prediction = tanh(x + t / 1000 + label / 10): an Engine in one line of NumPy."""

    runtime, device, concurrent, max_batch = "toy", "cpu", True, None

    def __init__(self, sample_shape: tuple[int, ...] = (1, 28, 28), labelled: bool = True) -> None:
        image = TensorSpec((None, *sample_shape), np.dtype(np.float32))
        number = TensorSpec((None,), np.dtype(np.int64))
        self.inputs = {"x": image, "t": number} | ({"label": number} if labelled else {})
        self.outputs = {"prediction": image}
        self.calls: list[dict[str, np.ndarray]] = []
        self.closed = False

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        check_inputs(self.inputs, arrays)
        self.calls.append({name: array.copy() for name, array in arrays.items()})
        shift = arrays["t"] / 1000 + arrays.get("label", np.zeros(1)) / 10
        shift = shift.astype(np.float32)[:, None, None, None]
        return {"prediction": np.tanh(arrays["x"] + shift)}

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> ToyEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def rewrite(path: Path, remove: str = "", rehash: bool = False, **changes: object) -> None:
    """Change fields of a bundle.json so that its digest fits again.

    With `rehash`, the list of files becomes what is in the directory.
    """
    document = json.loads((path / manifest.MANIFEST).read_text()) | changes
    document.pop(remove, None)
    if rehash:
        document["files"] = {
            file.name: {
                "size": file.stat().st_size,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            for file in path.iterdir()
            if file.name != manifest.MANIFEST
        }
    document["digest"] = manifest.digest_of(document)
    (path / manifest.MANIFEST).write_text(json.dumps(document))


TINY_SHAPE = (1, 8, 8)
TINY = manifest.Manifest(
    name="tiny",
    sample_shape=TINY_SHAPE,
    schedule=Schedule.linear(),
    prediction="eps",
    timestep_offset=-1,
    class_names=("a", "b"),
    plan={"sampler": "ddim", "steps": 5},
    variants={"fp32": {"file": "unet.onnx"}},
)


def tiny_model() -> onnx.ModelProto:
    """A network of 14 nodes with inputs and output as `TINY` says."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    constants = {
        "w1": rng.standard_normal((4, 1, 3, 3)).astype(np.float32),
        "w2": rng.standard_normal((1, 4, 3, 3)).astype(np.float32),
        "table": rng.standard_normal((3, 1)).astype(np.float32),
        "ones2": np.ones(2, np.float32),
        "groups": np.array([0, 2, -1]),
        "image": np.array([0, 4, 8, 8]),
        "ones3": np.ones(3, np.int64),
        "axes123": np.array([1, 2, 3]),
        "axes23": np.array([2, 3]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], pads=[1] * 4),
        helper.make_node("Reshape", ["c1", "groups"], ["g1"]),
        helper.make_node("InstanceNormalization", ["g1", "ones2", "ones2"], ["g2"], epsilon=1e-5),
        helper.make_node("Reshape", ["g2", "image"], ["c2"]),
        helper.make_node("Sigmoid", ["c2"], ["c3"]),
        helper.make_node("Conv", ["c3", "w2"], ["c4"], pads=[1] * 4, strides=[1, 1]),
        helper.make_node("Cast", ["t"], ["t1"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["t1", "axes123"], ["t2"]),
        helper.make_node("Shape", ["t"], ["batch"]),
        helper.make_node("Concat", ["batch", "ones3"], ["sizes"], axis=0),
        helper.make_node("Expand", ["t2", "sizes"], ["t3"]),
        helper.make_node("Gather", ["table", "label"], ["l1"], axis=0),
        helper.make_node("Unsqueeze", ["l1", "axes23"], ["l2"]),
        helper.make_node("Sum", ["c4", "t3", "l2"], ["prediction"]),
    ]
    image = (TensorProto.FLOAT, ["batch", *TINY_SHAPE])
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("x", *image),
            helper.make_tensor_value_info("t", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("prediction", *image)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)


def tiny_bundle(path: Path, model: bytes | None = None) -> Path:
    """A bundle around `tiny_model`, or around other bytes."""
    data = tiny_model().SerializeToString() if model is None else model
    bundle.write_bundle(path, TINY, {"unet.onnx": data, "reference.npz": bytes(range(256))})
    return path
