"""A torch network as ONNX bytes: opset 18, one file, dynamic batch, static shapes otherwise."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.errors import ExportError, RuntimeUnavailableError
from ddpm_edge.manifest import Manifest

if TYPE_CHECKING:
    import onnx
    from torch import nn

OPSET = 18  # GroupNormalization of opset 21 fails on TensorRT <= 10.7


def to_onnx(model: nn.Module, manifest: Manifest) -> bytes:
    """The network as an ONNX model with inputs x, t and perhaps label, and output prediction.

    Args:
        model: `forward(x, t)` or, where the manifest names classes, `forward(x, t, label)`; in
            evaluation mode.
        manifest: its sample shape and classes; its schedule is repeated in `metadata_props`.

    Raises:
        RuntimeUnavailableError: torch, onnx or onnxscript is not installed.
    """
    names = ["t"] + (["label"] if manifest.class_names else [])
    example: dict[str, Array] = {"x": np.zeros((2, *manifest.sample_shape), np.float32)}
    example |= {name: np.zeros(2, np.int64) for name in names}
    return onnx_bytes(onnx_model(model, example, ["prediction"]), manifest.properties())


def onnx_model(
    model: nn.Module, example: Mapping[str, Array], outputs: Sequence[str]
) -> onnx.ModelProto:
    """Any torch network as an ONNX model, every first dimension the batch.

    Args:
        model: in evaluation mode; takes the arrays of `example` in order.
        example: inputs by name, a batch of 2 or more: a batch of 1 would become a constant.
        outputs: names of the outputs, in order.

    Raises:
        ExportError: something in the network has no ONNX form; the message names it.
        RuntimeUnavailableError: torch, onnx or onnxscript is not installed.
    """
    try:
        import onnxscript  # noqa: F401  (torch's exporter needs it)
        import torch
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"export needs torch, onnx and onnxscript ({error}); pip install 'ddpm-edge[export]'"
        ) from error
    from ddpm_edge.export.channel_scales import join_scales
    from ddpm_edge.export.static_shapes import make_static

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with _explained(), quiet("torch.onnx", "torch.fx", "torch._dynamo"):
        program = torch.onnx.export(
            model,
            tuple(torch.from_numpy(array).to(device) for array in example.values()),
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            input_names=list(example),
            output_names=list(outputs),
            dynamic_shapes=[{0: "batch"} for _ in example],
            verbose=False,
        )
    proto = make_static(program.model_proto)  # type: ignore[union-attr]  # None: to a file only
    proto = join_scales(proto)
    _strip(proto)
    return proto


def onnx_bytes(proto: onnx.ModelProto, properties: Mapping[str, str]) -> bytes:
    """The checked content of an .onnx file, with `properties` as its `metadata_props`."""
    import onnx

    onnx.helper.set_model_props(proto, dict(properties))
    onnx.checker.check_model(proto, full_check=True)
    data: bytes = proto.SerializeToString()
    return data


def _strip(proto: onnx.ModelProto) -> None:
    """Remove what names the exporter's source files and Python objects, not the network."""
    for node in proto.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*proto.graph.input, *proto.graph.output):
        value.ClearField("metadata_props")
    proto.graph.ClearField("value_info")  # whoever needs shapes infers them; loading reads less
    proto.graph.ClearField("metadata_props")
    proto.graph.name = "ddpm-edge"


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Keep the libraries of these loggers from talking about their own internals."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        # torch's exporter prints whole graphs when it fails.
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn what torch's exporter raises into an ExportError that names the cause."""
    import torch

    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        raise ExportError(_reason([str(cause) for cause in causes])) from error


def _reason(texts: Sequence[str]) -> str:
    """The message for the texts of an exporter's error and its causes."""
    text = "\n".join(texts)
    if found := re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text):
        return (
            f"the network uses {found[1]}, which has no ONNX form at opset {OPSET}; compute it "
            "from operators that have one"
        )
    if "data-dependent" in text:
        place = re.findall(r'File "([^"]+)", line (\d+), in .*\n\s*(.+)', text)
        where = f" ({place[-1][0]}, line {place[-1][1]}: `{place[-1][2]}`)" if place else ""
        return (
            f"the network branches on the values of a tensor{where}; an exported graph cannot: "
            "use torch.where, or decide by shapes and settings"
        )
    if "inferred a static shape" in text:
        return (
            "the network fixes the size of the batch or of another input; make what it adds or "
            "reshapes follow x.shape[0]"
        )
    return f"the network cannot be exported: {texts[-1].strip().splitlines()[0]}"
