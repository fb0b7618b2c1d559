"""What a classifier sees in images, to judge samples by; no torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddpm_edge.arrays import Array, Float32
from ddpm_edge.errors import ConfigError, EngineError
from ddpm_edge.runtimes import open_engine

BUILT_IN = Path(__file__).parent / "bundles" / "fashion-mnist-features.onnx"
IMAGES = "uint8, or float32 in [-1, 1], of shape (N, H, W, C) with N >= 1"


class Judged(NamedTuple):
    """What the network says of N images."""

    features: Float32  # (N, D)
    logits: Float32  # (N, classes); their softmax is the classes' probabilities


class FeatureNetwork:
    """An ONNX model with input x float32 (B, C, H, W) in [-1, 1], outputs features and logits.

    Args:
        model, device, threads: as for `open_engine`; the runtime is always ONNX Runtime.

    Raises:
        EngineError: the model cannot be loaded, or has other inputs or outputs.
    """

    def __init__(
        self, model: str | Path | bytes, device: str | None = None, threads: int | None = None
    ) -> None:
        self.engine = open_engine(model, "onnxruntime", device, threads)
        takes, gives = list(self.engine.inputs), list(self.engine.outputs)
        if takes != ["x"] or not set(Judged._fields) <= set(gives):
            raise EngineError(f"the model must be x -> features, logits; got {takes} -> {gives}")

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
        if images.dtype == np.float32 and not np.abs(images).max(initial=0) <= 1:  # nor NaN
            raise ConfigError(f"images must be {IMAGES}; some values are outside or NaN")
        parts = []
        for first in range(0, len(images), batch):
            x = images[first : first + batch].transpose(0, 3, 1, 2)
            x = x.astype(np.float32) / 127.5 - 1 if x.dtype == np.uint8 else x
            parts.append(self.engine({"x": np.ascontiguousarray(x)}))
        return Judged(*(np.concatenate([p[k] for p in parts]) for k in Judged._fields))

    def __enter__(self) -> FeatureNetwork:
        return self

    def __exit__(self, *exc: object) -> None:
        self.engine.close()
