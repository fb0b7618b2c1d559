"""What a classifier sees in images, to judge samples by; no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddpm_edge.arrays import Array, Float32
from ddpm_edge.errors import ConfigError, EngineError
from ddpm_edge.runtimes import open_engine
from ddpm_edge.runtimes.base import TensorSpec
from ddpm_edge.runtimes.select import model_bytes

BUILT_IN = Path(__file__).parent / "bundles" / "fashion-mnist-features.onnx"
IMAGES = "uint8, or float32 in [-1, 1], of shape (N, H, W, C) with N >= 1"


class Judged(NamedTuple):
    """What the network says of N images."""

    features: Float32  # (N, D)
    logits: Float32 | None  # (N, classes), whose softmax is the classes' probabilities; None = none


class FeatureNetwork:
    """An ONNX model of images float32 (B, C, H, W) in [-1, 1].

    It has one input of any name, and an output `features`, or a single one of any name, (B, D) or
    (B, D, 1, 1); `logits` (B, classes) too where it is a classifier.

    Args:
        model, device, threads: as for `open_engine`; the runtime is always ONNX Runtime.

    Raises:
        EngineError: the model cannot be loaded, or has other inputs or outputs.
    """

    def __init__(
        self, model: str | Path | bytes, device: str | None = None, threads: int | None = None
    ) -> None:
        data = model_bytes(model)
        self.digest = hashlib.sha256(data).hexdigest()
        self.engine = open_engine(data, "onnxruntime", device, threads)
        takes, gives = self.engine.inputs, self.engine.outputs
        shapes = [spec.shape for spec in takes.values()]
        names = ["features"] if "features" in gives else list(gives)
        if len(takes) != 1 or len(shapes[0]) != 4 or len(names) != 1:
            self.engine.close()
            raise EngineError(
                "a feature model takes one input of images (B, C, H, W) and gives 'features', or "
                f"one output alone; got {_words(takes)} -> {_words(gives)}"
            )
        (self._input,), (self._features,) = takes, names
        self.image_shape = shapes[0][1:]  # (C, H, W), None = any

    @classmethod
    def fashion_mnist(cls, device: str | None = None, threads: int | None = None) -> FeatureNetwork:
        """The built-in: x (B, 1, 28, 28), 96 features, the logits of Fashion-MNIST's 10 classes."""
        return cls(BUILT_IN, device, threads)

    def __call__(self, images: Array, batch: int = 250) -> Judged:
        """Judge images (N, H, W, C), N >= 1, uint8 or float32 in [-1, 1], `batch` at a time.

        Raises:
            ConfigError, EngineError: another dtype or range; a shape the model does not take.
        """
        if images.dtype not in (np.uint8, np.float32) or images.ndim != 4 or not len(images):
            raise ConfigError(f"images must be {IMAGES}; got {images.dtype} {images.shape}")
        wanted, got = self.image_shape, (images.shape[3], *images.shape[1:3])
        if any(size not in (None, has) for size, has in zip(wanted, got, strict=True)):
            raise ConfigError(
                f"the feature model takes images (C, H, W) = {_sizes(wanted)}, these are "
                f"{_sizes(got)}: export it with the resizing and the channels that it needs"
            )
        if images.dtype == np.float32 and not np.abs(images).max(initial=0) <= 1:  # nor NaN
            raise ConfigError(f"images must be {IMAGES}; some values are outside or NaN")
        parts = []
        for first in range(0, len(images), batch):
            x = images[first : first + batch].transpose(0, 3, 1, 2)
            x = x.astype(np.float32) / 127.5 - 1 if x.dtype == np.uint8 else x
            answers = self.engine({self._input: np.ascontiguousarray(x)})
            features = answers[self._features]
            if features.ndim < 2 or features[0].size != features.shape[1]:
                raise EngineError(
                    f"the feature model gives {features.shape} for {len(x)} images; expected "
                    "(B, D) or (B, D, 1, 1): take the mean over all positions"
                )
            parts.append(Judged(features.reshape(len(x), -1), answers.get("logits")))
        features = np.concatenate([part.features for part in parts])
        logits = [part.logits for part in parts if part.logits is not None]
        return Judged(features, np.concatenate(logits) if logits else None)

    def __enter__(self) -> FeatureNetwork:
        return self

    def __exit__(self, *exc: object) -> None:
        self.engine.close()


def _words(specs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(f"{name} {_sizes(spec.shape)}" for name, spec in specs.items())


def _sizes(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"
