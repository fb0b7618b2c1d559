"""Images in and out: NHWC uint8 or float32 in [-1, 1] outside, NCHW float32 inside."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpm_edge import checks
from ddpm_edge.arrays import Array, Bool, Float32, UInt8
from ddpm_edge.errors import ConfigError, DataError, warn
from ddpm_edge.files import write_bytes

if TYPE_CHECKING:
    from PIL import Image

ALPHA = ("LA", "PA", "RGBA", "RGBa")  # Pillow's modes with transparency
BACKGROUND = "white"
ROUNDING = 1e-3  # how far outside [-1, 1] a float image may be


class ImageWarning(UserWarning):
    """Images that are in range, but hardly as they were meant."""


def from_images(images: Any, shape: tuple[int, ...], name: str = "image") -> Float32:
    """Images as states (n, C, H, W), float32 in [-1, 1]; the inverse of `to_images`.

    Args:
        images: one or many, uint8 or floats in [-1, 1]: (H, W, C) or (n, H, W, C), without C where
            it is 1.
        shape: (C, H, W) that they must have.
        name: what they are called in messages.

    Raises:
        ConfigError: another shape, dtype or range.

    Warns:
        ImageWarning: floats without any below 0, which look like [0, 1].
    """
    channels, height, width = shape
    values = checks.array(name, images)
    one = (height, width, channels)
    if channels == 1 and values.shape[-3:] != one and values.shape[-2:] == one[:2]:
        values = values[..., None]
    if values.shape[-3:] != one or values.ndim not in (3, 4) or not values.size:
        raise ConfigError(
            f"{name} must be {one} (height, width, channels), or (n, {height}, {width}, "
            f"{channels}) for several; got {values.shape}: crop or resize it"
        )
    values = values.reshape(-1, *one).transpose(0, 3, 1, 2)
    if values.dtype == np.uint8:
        return np.asarray(values / 127.5 - 1.0, np.float32, order="C")
    if values.dtype.kind != "f":
        raise ConfigError(
            f"{name} must be uint8, or float32 in [-1, 1]; got {values.dtype}: give "
            "np.asarray(x, np.uint8) if its values are 0..255"
        )
    least, most = float(values.min()), float(values.max())
    if not (least >= -1 - ROUNDING and most <= 1 + ROUNDING):  # NaN is neither
        bytes_ = least >= 0 and most <= 255
        remedy = "these look like [0, 255]: give uint8, or x / 127.5 - 1" if bytes_ else "scale it"
        raise ConfigError(
            f"{name} must be uint8, or float32 in [-1, 1]; got {values.dtype} in [{least:g}, "
            f"{most:g}]: {remedy}"
        )
    if least >= 0:
        warn(
            f"{name} is {values.dtype} in [{least:g}, {most:g}], which looks like [0, 1]; images "
            "are in [-1, 1]: give 2 x - 1 if so, or uint8",
            ImageWarning,
        )
    return np.ascontiguousarray(values.clip(-1, 1), np.float32)


def to_mask(mask: Any) -> Bool:
    """Masks (n, H, W), True where pixels are to be painted.

    Args:
        mask: (H, W) or (n, H, W), also with a last axis of 1: bool, {0, 1} or {0, 255}.

    Raises:
        ConfigError: other values or shapes, or a mask that is empty or full.
    """
    values = checks.array("a mask", mask)
    given = values.shape
    if values.ndim in (3, 4) and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or not values.size:
        raise ConfigError(
            f"a mask must be (height, width), or (n, height, width) for one an image; got {given}"
        )
    if not (np.isin(values, (0, 1)).all() or np.isin(values, (0, 255)).all()):
        raise ConfigError(
            "a mask must hold bools, 0 and 1, or 0 and 255 (not 0 where pixels are to be painted); "
            f"got {values.dtype} with {', '.join(map(str, np.unique(values)[:5]))}: threshold it"
        )
    painted: Bool = values.reshape(-1, *values.shape[-2:]) != 0
    for i, one in enumerate(painted):
        which = "the mask" if len(painted) == 1 else f"mask {i} of {len(painted)} (from {given})"
        if not one.any():
            raise ConfigError(f"{which} is empty, nothing would be painted; set pixels to 1 or 255")
        if one.all():
            raise ConfigError(f"{which} is full, no pixel would be known; use sample, or vary")
    return painted


def to_images(x: Array, dtype: str = "uint8") -> Array:
    """States (B, C, H, W) in [-1, 1] as images (B, H, W, C), uint8 or float32, clipped to range."""
    x = np.clip(x, -1.0, 1.0).transpose(0, 2, 3, 1)
    if dtype == "float32":
        return np.ascontiguousarray(x, np.float32)
    return np.ascontiguousarray(np.rint((x + 1.0) * 127.5).astype(np.uint8))


def read_image(path: str | Path, channels: int = 3) -> UInt8:
    """An image file, as its EXIF tag turns it, as uint8 (H, W, C); C = 1 (gray) or 3 (RGB).

    It is laid on white where it is transparent, as images for training are.

    Raises:
        DataError: not an image, or one of 16 or more bits a channel.
        OSError: the file cannot be opened.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    with open(path, "rb") as file:
        try:
            image = ImageOps.exif_transpose(Image.open(file))
            if image.mode[0] in "IF":
                raise DataError(f"{path} has 16 or more bits a channel; convert it to 8")
            array: UInt8 = np.asarray(flat(image, "L" if channels == 1 else "RGB"))
        except UnidentifiedImageError as error:
            raise DataError(f"{path} is not an image of a format that Pillow reads") from error
        except (OSError, SyntaxError, EOFError) as error:  # cut short, or damaged
            raise DataError(f"{path} cannot be read as an image ({error})") from error
        except Image.DecompressionBombError as error:
            raise DataError(f"{path} has more pixels than Pillow trusts; shrink it") from error
    return array[:, :, None] if array.ndim == 2 else array


def flat(image: Image.Image, mode: str) -> Image.Image:
    """An image of Pillow in mode L or RGB, on white where it is transparent."""
    from PIL import Image

    if image.mode in ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image.convert(mode)


def to_png(image: Array) -> bytes:
    """One uint8 image (H, W, C) or (H, W), C = 1 or 3, as the bytes of a PNG.

    Raises:
        ConfigError: another dtype or shape.
    """
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
    return buffer.getvalue()


def save_image(image: Array, path: str | Path) -> None:
    """Write one image as PNG (see `to_png`); atomic.

    Raises:
        ConfigError: no such image, or a name of another format.
        OSError: the path cannot be written.
    """
    if Path(path).suffix.lower() not in ("", ".png"):
        raise ConfigError(f"images are written as .png; got {path}")
    write_bytes(path, to_png(image))


def grid(images: Array, columns: int | None = None, scale: int | None = 1, gap: int = 2) -> Array:
    """Images (N, H, W, C) uint8 side by side on white, about square: uint8 (H', W', C).

    Scale None: small ones are enlarged to about 64 pixels.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ConfigError(
            f"a grid needs uint8 images (N, H, W, C), N >= 1; got {images.dtype} {images.shape}"
        )
    if scale is None:
        scale = max(1, round(64 / images.shape[1]))
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
        ConfigError: not uint8 images of that shape, or a name of another format.
        OSError: the path cannot be written.
    """
    save_image(grid(images, columns, scale), path)
