"""A small classifier whose last features judge generated images.

`python -m ddpm_edge.train.features --data fashion-mnist --epochs N --seed 0 -o FILE.onnx` trains it
on the training images, exports it and measures the exported file on the test images, which nothing
before that has seen. `ddpm_edge.features` runs the file, without torch.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_edge.errors import ConfigError, DataError, DdpmEdgeError
from ddpm_edge.features import FeatureNetwork
from ddpm_edge.files import write_bytes
from ddpm_edge.train.data import Dataset, load
from ddpm_edge.train.trainer import batches, resolve_device, resolve_precision

SHIFT = 2  # pixels, each way
LABEL_SMOOTHING = 0.05
WEIGHT_DECAY = 0.02


class Classifier(nn.Sequential):
    """Convolutions to one vector an image, and a linear layer on it.

    `forward(x)`: x float32 (B, channels, H, W) in [-1, 1], H and W >= 4; returns the features
    float32 (B, 96), none negative, and the logits (B, classes). Only layers that every runtime
    fuses: a batch normalisation folds into its convolution.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *layer(channels, 32),
            nn.MaxPool2d(2),
            *layer(32, 64),
            *layer(64, 64),
            nn.MaxPool2d(2),
            *layer(64, 96),
            *layer(96, 96),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(96, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)  # (B, 96)
        return features, self.head(features)


def layer(channels: int, out: int) -> tuple[nn.Module, ...]:
    """3x3 convolution, normalisation, ReLU."""
    return (
        nn.Conv2d(channels, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )
