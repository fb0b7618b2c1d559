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
            ConfigError: images of another dtype, shape or range.
        """
        _, channels, height, width = self.engine.inputs["x"].shape
        want = (height, width, channels)
        fits = images.ndim == 4 and all(w in (None, g) for w, g in zip(want, images.shape[1:]))
        if images.dtype not in (np.uint8, np.float32) or not fits or not images.size:
            sizes = ", ".join(str(w or "any") for w in want)
            raise ConfigError(
                f"images must be uint8, or float32 in [-1, 1], of shape (N, {sizes}) with N >= 1; "
                f"got {images.dtype} {images.shape}"
            )
        if images.dtype == np.float32 and not (images.min() >= -1 and images.max() <= 1):
            raise ConfigError("float32 images must be in [-1, 1] and finite; these are not")
        answers = [self._judge(images[i : i + batch]) for i in range(0, len(images), batch)]
        return Features(*(np.concatenate([a[n] for a in answers]) for n in ("features", "logits")))

    def _judge(self, images: Array) -> dict[str, Array]:
        x = images / np.float32(127.5) - 1 if images.dtype == np.uint8 else images
        return self.engine({"x": np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32)})
