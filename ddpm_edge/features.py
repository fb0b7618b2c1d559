"""What a classifier sees in images, to judge samples by; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddpm_edge.arrays import Array, Float32
from ddpm_edge.errors import ConfigError, EngineError
from ddpm_edge.runtimes import TensorSpec, open_engine

BUILT_IN = Path(__file__).parent / "bundles" / "fashion-mnist-features.onnx"


@dataclass(frozen=True)
class Features:
    """Answers for N images: features float32 (N, D), logits float32 (N, classes)."""

    features: Float32
    logits: Float32

    @property
    def probabilities(self) -> Float32:
        """Softmax of the logits: float32 (N, classes), each row sums to 1."""
        e = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return np.asarray(e / e.sum(axis=1, keepdims=True), np.float32)


class FeatureNetwork:
    """An ONNX model with input x float32 (B, C, H, W) in [-1, 1], outputs features and logits.

    Args:
        model: an .onnx file, or its bytes.
        device, threads: as for `open_engine`. The runtime is always ONNX Runtime.

    Raises:
        EngineError: the model cannot be loaded, or has other inputs or outputs.
    """

    def __init__(
        self, model: str | Path | bytes, device: str | None = None, threads: int | None = None
    ) -> None:
        # Not "auto": a runtime that rounds elsewhere would move every figure made from features.
        self.engine = open_engine(model, "onnxruntime", device, threads)
        takes, gives = self.engine.inputs, self.engine.outputs
        image = takes.get("x", TensorSpec((), np.dtype(np.float32)))
        if len(takes) != 1 or len(image.shape) != 4 or not {"features", "logits"} <= gives.keys():
            raise EngineError(
                "a feature network takes x (B, C, H, W) and gives features and logits; got "
                f"{', '.join(takes)} and {', '.join(gives)}"
            )

    @classmethod
    def fashion_mnist(cls, device: str | None = None, threads: int | None = None) -> FeatureNetwork:
        """The built-in one: 28x28 grey images, 96 features, the 10 classes of Fashion-MNIST."""
        return cls(BUILT_IN, device, threads)

    def __call__(self, images: Array, batch: int = 250) -> Features:
        """Judge images (N, H, W, C), N >= 1, uint8 or float32 in [-1, 1], `batch` at a time.

        Raises:
            ConfigError: images of another dtype, shape or range, or no batch.
        """
        _, channels, *size = self.engine.inputs["x"].shape
        fits = len(images) >= 1 if images.ndim == 4 else False
        raise ConfigError
