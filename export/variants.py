"""Variants of a float32 model, each behind a gate.

Half precision has a ladder that is climbed until the gate is passed: fp16, fp16 with more layers in
float32, the same for bf16, and then nothing but float32. int8 has one rung. What failed, and the
layer that broke, is recorded in the bundle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.errors import EngineError, ExportError, NonFiniteError
from ddpm_edge.export.gate import Report, VariantGate
from ddpm_edge.export.precision import (
    HALF,
    LARGEST,
    float_tensors,
    half_nodes,
    layers,
    rounded,
    to_half,
)
from ddpm_edge.export.quantize import to_int8
from ddpm_edge.export.to_onnx import onnx_bytes
from ddpm_edge.manifest import Manifest
from ddpm_edge.reference import INT8, Comparison, Reference
from ddpm_edge.runtimes.base import WrappedEngine
from ddpm_edge.runtimes.onnx_runtime import OnnxRuntimeEngine
from ddpm_edge.sampling import Network

if TYPE_CHECKING:
    import onnx

VARIANTS = ("fp32", *HALF, INT8)
FILES = {"fp32": "unet.onnx"} | {name: f"unet.{name}.onnx" for name in VARIANTS[1:]}
MARGIN = 2.0  # layers that come within this factor of overflow stay in float32


class Variant(NamedTuple):
    """A model that has passed its gate.

    Attributes:
        name: its precision.
        data: the ONNX file.
        entry: what the manifest says of it.
    """

    name: str
    data: bytes
    entry: dict[str, Any]


# From what is wanted up: a precision, and whether with more layers in float32.
LADDERS = {
    "fp16": (("fp16", False), ("fp16", True), ("bf16", False), ("bf16", True)),
    "bf16": (("bf16", False), ("bf16", True)),
}


def make_variant(
    model: onnx.ModelProto, wanted: str, gate: VariantGate, report: Report | None = None
) -> tuple[Variant | None, list[str]]:
    """The model in this precision, or in a higher one that passes; None = only float32 does.

    Args:
        model: the float32 model.
        wanted: one of VARIANTS but "fp32".
        gate: what a variant must pass.
        report: called with each of its comparisons.

    Returns:
        The variant, and for each that failed what failed and which layer broke.
    """
    if wanted == INT8:
        return int8_variant(model, gate, report)
    return half_variant(model, wanted, gate, report)


def int8_variant(
    model: onnx.ModelProto, gate: VariantGate, report: Report | None = None
) -> tuple[Variant | None, list[str]]:
    """The model in int8, if it passes (see `make_variant`)."""
    try:
        quantised, kept = to_int8(model, gate.single)
    except ExportError as error:
        return None, [f"{INT8}: {error}"]
    passed, reason = _try(quantised, INT8, gate, report)
    if reason:
        return None, [f"{INT8}: {reason}"]
    return _variant(INT8, quantised, gate.single.manifest, passed, kept), []


def half_variant(
    model: onnx.ModelProto, wanted: str, gate: VariantGate, report: Report | None = None
) -> tuple[Variant | None, list[str]]:
    """The lowest rung of the ladder from `wanted`, fp16 or bf16, up (see `make_variant`)."""
    manifest = gate.single.manifest
    failed: list[str] = []
    largest: dict[str, float] = {}
    for precision, more in LADDERS[wanted]:
        keep = more_in_single(model, precision, largest) if more else {}
        typed = to_half(model, precision, keep)
        passed, reason = _try(typed, precision, gate, report)
        if not reason:
            return _variant(precision, typed, manifest, passed, keep.values()), failed
        largest = largest or ranges(model, gate.reference, manifest)
        kept = f" with {len(keep)} more layers in fp32" if keep else ""
        failed.append(f"{precision}{kept}: {reason}{_broken(model, precision, keep, largest)}")
    return None, failed


def _variant(
    precision: str,
    model: onnx.ModelProto,
    manifest: Manifest,
    passed: Iterable[Comparison],
    kept: Iterable[str],
) -> Variant:
    """What has passed, with what the bundle says of it."""
    figures = {c.what: c.figure() for c in passed}
    entry: dict[str, Any] = {"file": FILES[precision], "parity": figures}
    entry |= {"kept_in_fp32": list(kept)} if kept else {}
    return Variant(precision, onnx_bytes(model, manifest.properties()), entry)


def _try(
    typed: onnx.ModelProto, precision: str, gate: VariantGate, report: Report | None
) -> tuple[list[Comparison], str]:
    """The comparisons of a model, and why it does not pass the gate; "" = it does."""
    passed: list[Comparison] = []
    half = precision in HALF  # int8 is computed by the kernels that CPUs run it by
    data = (rounded(typed, precision) if half else typed).SerializeToString()
    try:
        with OnnxRuntimeEngine(data, device="cpu", optimize=not half) as engine:
            for comparison in gate.comparisons(Network(engine, gate.single.manifest), precision):
                if report is not None:
                    report(replace(comparison, what=f"{precision}: {comparison.what}"))
                if not comparison.passed:
                    return passed, str(comparison)
                passed.append(comparison)
    except (NonFiniteError, EngineError) as error:
        return passed, str(error)
    return passed, ""


def ranges(model: onnx.ModelProto, reference: Reference, manifest: Manifest) -> dict[str, float]:
    """The largest absolute value of every float32 tensor, for `reference`'s questions."""
    engine = RangeEngine(model)
    with engine:
        reference.answers_of(Network(engine, manifest), batch=1)
    return engine.largest


class RangeEngine(WrappedEngine):
    """A float32 model that notes the largest absolute value of every tensor."""

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx

        watched = onnx.shape_inference.infer_shapes(model)
        constants = {c.name: c for c in watched.graph.initializer}
        given = {value.name for value in (*watched.graph.input, *watched.graph.output)}
        floats = float_tensors(watched)
        for name in sorted(floats - constants.keys() - given):
            value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            watched.graph.output.append(value)
        super().__init__(OnnxRuntimeEngine(watched.SerializeToString(), "cpu", optimize=False))
        self.outputs = {"prediction": self.outputs["prediction"]}
        self.largest = {
            name: _largest(onnx.numpy_helper.to_array(constants[name]))
            for name in floats & constants.keys()
        }

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the model (see `Engine`)."""
        answers = super().__call__(arrays)
        for name, value in answers.items():
            self.largest[name] = max(self.largest.get(name, 0.0), _largest(value))
        return {"prediction": answers["prediction"]}


def _largest(values: Array) -> float:
    """Of the finite ones: a mask of -inf overflows nothing."""
    return float(np.max(np.abs(values[np.isfinite(values)]), initial=0.0))


def more_in_single(
    model: onnx.ModelProto, precision: str, largest: Mapping[str, float]
) -> dict[str, str]:
    """Which nodes to keep in float32 after a failure: first output -> the layer's name.

    Those that come near to overflow; where none does, the first and the last convolution and the
    products of the attention, as is usual.
    """
    halves = half_nodes(model)
    nodes = [(node, name) for node, name in layers(model) if node.output[0] in halves]
    limit = LARGEST[precision] / MARGIN
    keep = {
        node.output[0]: name
        for node, name in nodes
        if any(largest.get(tensor, 0.0) > limit for tensor in (*node.input, *node.output))
    }
    if keep:
        return keep
    convolutions = [node.output[0] for node, _ in nodes if node.op_type == "Conv"]
    ends = {*convolutions[:1], *convolutions[-1:]}
    return {
        node.output[0]: name
        for node, name in nodes
        if node.output[0] in ends or node.op_type == "MatMul"
    }


def _broken(
    model: onnx.ModelProto, precision: str, keep: Mapping[str, str], largest: Mapping[str, float]
) -> str:
    """The first layer whose values do not fit the precision, for a message."""
    halves = half_nodes(model) - keep.keys()
    for node, name in layers(model):
        reached = max(largest.get(tensor, 0.0) for tensor in (*node.input, *node.output))
        if node.output[0] in halves and reached > LARGEST[precision]:
            return (
                f"; layer {name!r} reaches {reached:.2g}, and {precision} ends at "
                f"{LARGEST[precision]:.5g}"
            )
    return ""
