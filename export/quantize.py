"""A float32 network with its convolutions in int8, float32 in and out.

`onnxruntime.quantization` does it: symmetric int8 with one scale a tensor for activations and one a
channel for weights, between QuantizeLinear and DequantizeLinear (QDQ), which ONNX Runtime,
OpenVINO and TensorRT all compute in int8. Scales are the largest values that tensors reach while
the network samples. Everything but convolutions stays in float32: normalisation, softmax,
products of the attention, and the embeddings of timestep and label.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddpm_edge import samplers
from ddpm_edge.arrays import Array
from ddpm_edge.errors import ClosedError, EngineLostError, ExportError
from ddpm_edge.export.precision import layers
from ddpm_edge.plan import Plan
from ddpm_edge.runtimes.base import Engine, WrappedEngine
from ddpm_edge.sampling import MAX_BATCH, Network, sample_states

if TYPE_CHECKING:
    import onnx

SEED = 2  # the gate's samples have 0 and 1: it must not judge what scales were fitted to
QUESTIONS = 250  # of each plan, about: 12 samples of 20 steps, and one of all T by Algorithm 2
DDIM_STEPS = 50
LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def to_int8(model: onnx.ModelProto, network: Network) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of a float32 model with `int8_nodes` in int8.

    Args:
        model: as `to_onnx` makes it.
        network: the same on an engine, which is sampled for the scales.

    Returns:
        The model, and the names of the convolutions that stay in float32.

    Raises:
        ExportError: no convolution can be in int8, or onnxruntime.quantization fails.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    chosen = int8_nodes(model)
    if not chosen:
        raise ExportError(
            "the network has no convolution with constant weights between its first and last layer"
        )
    kept = [
        name
        for node, name in layers(model)
        if node.op_type == "Conv" and node.output[0] not in chosen
    ]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        node.name = node.output[0]  # unique, as the names of nodes need not be
    # Shapes are inferred there and the exporter has optimised: or else it warns that neither is so.
    onnx.helper.set_model_props(copy, {"onnx.quant.pre_process": "onnxruntime.quant"})
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        onnx.save(copy, given)
        try:
            quantize_static(
                given,
                made,
                Trajectories(network),
                quant_format=QuantFormat.QDQ,
                nodes_to_quantize=[node.name for node in copy.graph.node if node.name in chosen],
                op_types_to_quantize=["Conv"],
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                extra_options={
                    "ActivationSymmetric": True,  # TensorRT knows no zero points
                    "WeightSymmetric": True,
                    "QuantizeBias": False,  # nor int32; ONNX Runtime does it itself, from 1.21 on
                },
            )
        except (EngineLostError, ClosedError, MemoryError):
            raise
        except Exception as error:  # whatever the library and its sessions raise
            raise ExportError(
                f"onnxruntime.quantization failed: {error}; it needs onnxruntime 1.20 or later"
            ) from error
        quantised = onnx.load(made)
    quantised.producer_name, quantised.graph.name = model.producer_name, model.graph.name
    quantised.graph.ClearField("value_info")
    return quantised, kept


def int8_nodes(model: onnx.ModelProto) -> set[str]:
    """First outputs of the convolutions that may be computed in int8.

    They have constant weights, depend on x, and lie between other layers: the first and the last
    layers of the network stay in float32. So do those whose input is a concatenation: its parts
    have ranges of their own (Q-Diffusion, Li et al. 2023), and these are small, the shortcuts
    around the blocks; in a block the norm comes first.
    """
    constants = {c.name for c in model.graph.initializer}
    joined = {node.output[0] for node in model.graph.node if node.op_type == "Concat"}
    after_x, after_layer = {"x"}, set[str]()
    found: set[str] = set()
    for node in model.graph.node:
        if after_x.isdisjoint(node.input):
            continue
        after_x |= set(node.output)
        later = not after_layer.isdisjoint(node.input)
        fixed = node.op_type == "Conv" and node.input[1] in constants
        if later and fixed and node.input[0] not in joined:
            found.add(node.output[0])
        if later or node.op_type in LAYERS:
            after_layer |= set(node.output)
    before_layer: set[str] = set()
    for node in reversed(model.graph.node):
        earlier = not before_layer.isdisjoint(node.output)
        if not earlier:
            found -= set(node.output)  # nothing but its own result follows: a last layer
        if earlier or node.op_type in LAYERS:
            before_layer |= set(node.input)
    return found


class Trajectories:
    """What a network is asked while it samples: the calibration data of `quantize_static`.

    The default plan, DDIM and all steps of Algorithm 2, labels in turn with "no label" among them.
    """

    def __init__(self, network: Network) -> None:
        self._questions = questions(network)

    def get_next(self) -> dict[str, Array] | None:
        """The next inputs by name, None after the last."""
        return next(self._questions, None)


def questions(network: Network) -> Iterator[dict[str, Array]]:
    """The inputs of every evaluation of `plans`, in order, not all held at once."""
    manifest = network.manifest
    asked = AskedEngine(network.engine)
    for plan in plans(network):
        count = max(1, QUESTIONS // len(plan))
        # Backwards from "no label": it is among them however few there are.
        labels = (-1 - np.arange(count)) % manifest.labels if manifest.labels else None
        for first in range(0, count, MAX_BATCH):
            part = range(first, min(first + MAX_BATCH, count))
            some = None if labels is None else labels[part.start : part.stop]
            for _ in sample_states(Network(asked, manifest), plan, SEED, part, some):
                yield from asked.questions
                asked.questions.clear()


def plans(network: Network) -> list[Plan]:
    """The trajectories that scales are taken from."""
    manifest = network.manifest
    schedule = manifest.schedule
    return [
        manifest.make_plan(),
        samplers.ddim(schedule, steps=min(DDIM_STEPS, schedule.T), clip=1.0),
        samplers.ddpm(schedule, clip=1.0),
    ]


class AskedEngine(WrappedEngine):
    """An engine that notes what it is asked."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.questions: list[dict[str, Array]] = []

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the model (see `Engine`)."""
        self.questions.append({name: array.copy() for name, array in arrays.items()})
        return super().__call__(arrays)
