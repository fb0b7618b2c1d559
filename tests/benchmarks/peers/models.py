"""The models of the comparison: the same weights for diffusers, for a plain export and for us."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_edge import Bundle
from ddpm_edge.bundle import REFERENCE, write_bundle
from ddpm_edge.export import export_bundle, export_diffusers, quantize
from ddpm_edge.export.from_diffusers import read_diffusers
from ddpm_edge.export.to_onnx import onnx_bytes
from ddpm_edge.manifest import Manifest
from ddpm_edge.runtimes.onnx_runtime import OnnxRuntimeEngine
from ddpm_edge.sampling import Network
from ddpm_edge.train.unet import PRESETS

BUILT_IN, CIFAR10 = "built-in", "cifar10"
SMALL = PRESETS["small"]
KINDS = ["Attn" if level in SMALL.attention else "" for level in range(len(SMALL.widths))]
NETWORKS = {
    BUILT_IN: {  # as diffusers spells it
        "sample_size": 28,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": SMALL.blocks,
        "block_out_channels": SMALL.widths,
        "down_block_types": [f"{kind}DownBlock2D" for kind in KINDS],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(KINDS)],
        "norm_num_groups": SMALL.groups,
    },
    CIFAR10: {  # google/ddpm-cifar10-32 (Ho et al. 2020), 35.7 million parameters
        "sample_size": 32,
        "layers_per_block": 2,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 0,
        "norm_eps": 1e-6,
    },
}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # as diffusers says them
QUESTIONS = 20  # that calibrate an int8 which is only timed


def prepare(folder: Path, name: str, checkpoint: Path | None, batches: Iterable[int]) -> float:
    """Write `checkpoint/` (diffusers), `naive.onnx`, `bundle/` and the noise of each batch.

    Args:
        folder: where to.
        name: "built-in", or "cifar10" with random weights (seed 0).
        checkpoint: a folder of diffusers, instead.
        batches: sizes of the noise.

    Returns:
        GFLOP of one evaluation of one image.

    Raises:
        ExportError: not such a folder.
        SystemExit: its model takes labels, or answers with something else than diffusers' does.
    """
    pipeline = pipeline_of(name) if checkpoint is None else read(checkpoint)
    pipeline.save_pretrained(folder / "checkpoint")
    unet = pipeline.unet.eval()
    size, channels = unet.config.sample_size, unet.config.in_channels
    height, width = (size, size) if isinstance(size, int) else size
    export_naively(unet, (2, channels, height, width), folder / "naive.onnx")
    if name == BUILT_IN and checkpoint is None:  # as it is shipped, with labels
        export_bundle(Bundle.open().path, folder / "bundle", variants=("fp32", "bf16", "int8"))
    else:
        export_diffusers(folder / "checkpoint", folder / "bundle", variants=("fp32", "bf16"))
        add_int8(folder / "bundle")
    for batch in batches:
        noise = torch.randn(
            (batch, channels, height, width), generator=torch.Generator().manual_seed(0)
        )
        np.save(folder / f"noise{batch}.npy", noise.numpy())
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        unet(torch.zeros(1, channels, height, width), 10)
    return float(counter.get_total_flops()) / 1e9


def pipeline_of(name: str) -> DDPMPipeline:
    """The pipeline of diffusers called "built-in" or "cifar10"."""
    torch.manual_seed(0)
    network = UNet2DModel(
        attention_head_dim=None, flip_sin_to_cos=False, freq_shift=1, **NETWORKS[name]
    ).eval()
    if name == BUILT_IN:
        fill(network)
    return DDPMPipeline(network, DDPMScheduler())


def read(checkpoint: Path) -> DDPMPipeline:
    """A folder of diffusers, a pipeline or a bare network."""
    found = read_diffusers(checkpoint)
    schedule, prediction = found.process.schedule, found.process.prediction
    if found.class_names or prediction not in PREDICTIONS:
        raise SystemExit(f"{checkpoint}: the comparison takes a DDPM without labels")
    scheduler = DDPMScheduler(
        schedule.T,
        trained_betas=schedule.beta[1:].tolist(),
        prediction_type=PREDICTIONS[prediction],
    )
    return DDPMPipeline(found.network, scheduler)


def export_naively(unet: UNet2DModel, shape: tuple[int, ...], path: Path) -> None:
    """As a user of torch would, for any batch."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.unet(x, t, return_dict=False)[0]

    torch.onnx.export(
        Plain().eval(), (torch.randn(shape), torch.full(shape[:1], 10)), path, dynamo=True,
        input_names=["x", "t"], output_names=["prediction"], dynamic_shapes=[{0: "batch"}] * 2,
        external_data=False, verbose=False,
    )  # fmt: skip


def add_int8(path: Path) -> None:
    """The bundle with int8 that no gate has seen: its 1,500 images would take half an hour."""
    bundle = Bundle.open(path)
    manifest, data = bundle.manifest, {n: bundle.model(n)[1] for n in bundle.manifest.variants}
    quantize.QUESTIONS = QUESTIONS
    with OnnxRuntimeEngine(data["fp32"], "cpu") as engine:
        model, _ = quantize.to_int8(onnx.load_from_string(data["fp32"]), Network(engine, manifest))
    files = {entry["file"]: data[name] for name, entry in manifest.variants.items()}
    files |= {"unet.int8.onnx": onnx_bytes(model, manifest.properties())}
    entries = {**manifest.variants, "int8": {"file": "unet.int8.onnx"}}
    whole = Manifest(**{**vars(manifest), "variants": entries})
    write_bundle(path, whole, {**files, REFERENCE: bundle.read(REFERENCE)})


def fill(network: UNet2DModel) -> None:
    """Put the built-in model's weights into diffusers' network.

    Two things are split there, q, k and v and the time shift of each block; all else is the same.
    The embedding of the null label becomes a part of the time embedding's bias: the network is the
    model without a label.
    """
    graph = onnx.load_from_string(Bundle.open().model("fp32")[1]).graph
    of = {c.name: torch.tensor(np.array(onnx.numpy_helper.to_array(c))) for c in graph.initializer}
    of["network.time.linear2.bias"] += of["network.label.weight"][-1]
    convolutions, norms = _convolutions(graph, of), _norms(graph, of)
    rows = 0  # of the shifts' projection that were used
    with torch.no_grad():
        for name, layer in _used(network):
            kind = name.split(".")[-1]
            if kind == "time_emb_proj":
                end = rows + layer.out_features
                values = of["network.shifts.weight"][rows:end], of["network.shifts.bias"][rows:end]
                rows = end
            elif kind in ("linear_1", "linear_2"):
                torchs = f"network.time.{kind.replace('_', '')}"
                values = of[f"{torchs}.weight"], of[f"{torchs}.bias"]
            elif "norm" in kind:
                values = next(norms)
            else:  # a convolution, or a projection of an attention, which is one of 1 x 1 there
                values = next(convolutions)
            for parameter, value in zip(layer.parameters(recurse=False), values, strict=True):
                parameter.copy_(value.reshape(parameter.shape))


def _used(network: UNet2DModel) -> list[tuple[str, nn.Module]]:
    """Its layers with weights and their names, in the order in which a step uses them."""
    used: list[tuple[str, nn.Module]] = []
    for name, layer in network.named_modules():
        if [*layer.parameters(recurse=False)]:
            layer.register_forward_pre_hook(lambda m, _, name=name: used.append((name, m)))
    size, channels = network.config.sample_size, network.config.in_channels
    with torch.inference_mode():
        network(torch.zeros(1, channels, size, size), 0)
    for _, layer in used:
        layer._forward_pre_hooks.clear()
    return used


def _convolutions(graph: onnx.GraphProto, of: dict[str, Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Weights and biases of all convolutions in the order of their use; q, k and v apart."""
    for node in graph.node:
        if node.op_type == "Conv":
            pair = [of[name] for name in node.input[1:]]
            parts = 3 if ".qkv." in node.input[1] else 1
            yield from zip(*(tensor.chunk(parts) for tensor in pair), strict=True)


def _norms(graph: onnx.GraphProto, of: dict[str, Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Scales and shifts of all normalisations in the order of their use."""
    for node in graph.node:
        if node.op_type == "BatchNormalization":
            yield of[node.input[1]], of[node.input[2]]
