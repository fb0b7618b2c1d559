"""A torch network as ONNX bytes: opset 18, one file, dynamic batch, static shapes otherwise."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ddpm_edge.bundle import Manifest
from ddpm_edge.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    import onnx
    from torch import nn

OPSET = 18  # GroupNormalization of opset 21 fails on TensorRT <= 10.7


def to_onnx(model: nn.Module, manifest: Manifest) -> bytes:
    """The network as an ONNX model with inputs x, t and perhaps label, and output prediction.

    Args:
        model: `forward(x, t)` or, where the manifest names classes, `forward(x, t, label)`.
        manifest: its sample shape and classes; its schedule is repeated in `metadata_props`.

    Raises:
        RuntimeUnavailableError: torch, onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it)
        import torch
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"export needs torch, onnx and onnxscript ({error}); pip install 'ddpm-edge[export]'"
        ) from error
    from ddpm_edge.export.static_shapes import make_static

    names = ["x", "t"] + (["label"] if manifest.class_names else [])
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example = [torch.zeros(2, *manifest.sample_shape, device=device)]  # batch 1 would be a constant
    example += [torch.zeros(2, dtype=torch.int64, device=device) for _ in names[1:]]
    with _quiet():
        program = torch.onnx.export(
            model.eval(),
            tuple(example),
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            input_names=names,
            output_names=["prediction"],
            dynamic_shapes=[{0: "batch"} for _ in names],
            verbose=False,
        )
    assert program is not None  # only None when exporting to a file
    proto = make_static(program.model_proto)
    _strip(proto)
    onnx.helper.set_model_props(
        proto,
        {
            "sample_shape": json.dumps(manifest.sample_shape),
            "schedule": json.dumps(manifest.schedule.to_dict()),
            "prediction": manifest.prediction,
            "timestep_offset": str(manifest.timestep_offset),
        },
    )
    onnx.checker.check_model(proto, full_check=True)
    data: bytes = proto.SerializeToString()
    return data


def _strip(proto: onnx.ModelProto) -> None:
    """Remove what names the exporter's source files and Python objects, not the network."""
    for node in proto.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        value.ClearField("metadata_props")
    proto.graph.ClearField("metadata_props")
    proto.graph.name = "ddpm-edge"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporter from talking about its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
