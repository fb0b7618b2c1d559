"""What a classifier sees in images, to judge samples by; no torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddpm_edge.arrays import Array, Float32
from ddpm_edge.errors import ConfigError, EngineError
from ddpm_edge.runtimes import open_engine

BUILT_IN = Path(__file__).parent / "bundles" / "fashion-mnist-features.onnx"
BATCH = 250


class Judged(NamedTuple):
    """N images judged: features (N, D), logits and probabilities (N, classes), all float32."""

    features: Float32
    logits: Float32
    probabilities: Float32


class FeatureNetwork:
    """An ONNX model with input x float32 (B, C, H, W) in [-1, 1], outputs features and logits.

    Args:
        model: an .onnx file, or its bytes.
        device, threads: as for `open_engine`; the runtime is always ONNX Runtime.

    Raises:
        EngineError: the model cannot be loaded, or has other inputs or outputs.
    """

    def __init__(
        self, model: str | Path | bytes, device: str | None = None, threads: int | None = None
    ) -> None:
        self.engine = open_engine(model, "onnxruntime", device, threads)
        takes, gives = self.engine.inputs, self.engine.outputs
        if takes.keys() != {"x"} or not {"features", "logits"} <= gives.keys():
            got = f"this model takes {', '.join(takes)} and gives {', '.join(gives)}"
            raise EngineError(f"a feature network takes x and gives features and logits; {got}")

    @classmethod
    def fashion_mnist(cls, device: str | None = None, threads: int | None = None) -> FeatureNetwork:
        """The built-in: x (B, 1, 28, 28), 96 features, the logits of Fashion-MNIST's 10 classes."""
        return cls(BUILT_IN, device, threads)

    def __call__(self, images: Array) -> Judged:
        """Judge images (N, H, W, C), N >= 1, uint8 or float32 in [-1, 1].

        Raises:
            ConfigError: images of another dtype or range, or not (N, H, W, C).
            EngineError: H, W or C is not what the model takes.
        """
        if images.dtype not in (np.uint8, np.float32) or images.ndim != 4 or not len(images):
            got = f"{images.dtype} {images.shape}"
            raise ConfigError(f"images must be uint8 or float32 (N, H, W, C), N >= 1; got {got}")
        if images.dtype == np.float32 and not np.abs(images).max(initial=0) <= 1:  # nor NaN
            raise ConfigError("float32 images must be in [-1, 1]; some values are not")
        parts = [self._judge(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
        features, logits = (np.concatenate([p[k] for p in parts]) for k in ("features", "logits"))
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        return Judged(features, logits, e / e.sum(axis=1, keepdims=True))

    def _judge(self, images: Array) -> dict[str, Array]:
        x = images.astype(np.float32) / 127.5 - 1 if images.dtype == np.uint8 else images
        return self.engine({"x": np.ascontiguousarray(x.transpose(0, 3, 1, 2))})
