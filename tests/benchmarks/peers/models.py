"""The models of the comparison, as folders that diffusers loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from ddpm_edge import Bundle
from ddpm_edge.train.unet import PRESETS

BUILT_IN = "built-in"
# The network of google/ddpm-cifar10-32 (Ho et al. 2020), 35.7 million parameters.
CIFAR10 = {
    "sample_size": 32,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "norm_eps": 1e-6,
}
SMALL = PRESETS["small"]
KINDS = ["Attn" if level in SMALL.attention else "" for level in range(len(SMALL.widths))]
# The built-in model's network as diffusers spells it.
GARMENTS = {
    "sample_size": 28,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": SMALL.blocks,
    "block_out_channels": SMALL.widths,
    "down_block_types": [f"{kind}DownBlock2D" for kind in KINDS],
    "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(KINDS)],
    "norm_num_groups": SMALL.groups,
}


def write(model: str, folder: Path) -> None:
    """Write "built-in" or "cifar10" (random weights, seed 0) as a pipeline of diffusers."""
    torch.manual_seed(0)
    config = GARMENTS if model == BUILT_IN else CIFAR10
    network = UNet2DModel(
        attention_head_dim=None, flip_sin_to_cos=False, freq_shift=1, **config
    ).eval()
    if model == BUILT_IN:
        fill(network)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)


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
