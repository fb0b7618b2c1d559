"""Images in and out: NHWC uint8 or float32 in [-1, 1] outside, NCHW float32 inside."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.errors import ConfigError
from ddpm_edge.files import write_bytes


def to_images(x: Array, dtype: str = "uint8") -> Array:
    """States (B, C, H, W) in [-1, 1] as images (B, H, W, C), uint8 or float32, clipped to range."""
    x = np.clip(x, -1.0, 1.0).transpose(0, 2, 3, 1)
    if dtype == "float32":
        return np.ascontiguousarray(x, np.float32)
    return np.ascontiguousarray(np.rint((x + 1.0) * 127.5).astype(np.uint8))


def save_image(image: Array, path: str | Path) -> None:
    """Write one uint8 image (H, W, C) or (H, W), C = 1 or 3, as PNG; atomic."""
    from PIL import Image

    image = np.asarray(image)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.dtype != np.uint8 or not (
        image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
    ):
        raise ConfigError(
            f"a PNG needs uint8 (H, W), (H, W, 1) or (H, W, 3); got {image.dtype} {image.shape}"
        )
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def grid(images: Array, columns: int | None = None, scale: int = 1, gap: int = 2) -> Array:
    """Images (N, H, W, C) uint8 side by side on white, about square: uint8 (H', W', C)."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ConfigError(
            f"a grid needs uint8 images (N, H, W, C), N >= 1; got {images.dtype} {images.shape}"
        )
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8
    )
    for i, image in enumerate(images):
        top, left = (gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap))
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_grid(
    images: Array, path: str | Path, columns: int | None = None, scale: int | None = None
) -> None:
    """Write images (N, H, W, C) uint8 as one PNG; small ones are enlarged to about 64 pixels.

    Raises:
        ConfigError: not uint8 images of that shape.
        OSError: the path cannot be written.
    """
    images = np.asarray(images)
    if scale is None:
        scale = max(1, round(64 / images.shape[1])) if images.ndim == 4 else 1
    save_image(grid(images, columns, scale), path)
