"""What all readers of training data share: what is asked for, sizes, memory, progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from ddpm_edge.arrays import Array, UInt8
from ddpm_edge.checks import whole
from ddpm_edge.errors import ConfigError, DataError
from ddpm_edge.images import BACKGROUND

Progress: TypeAlias = Callable[[float, str], None]
T = TypeVar("T")

SPLITS = ("train", "test")
FITS = ("crop", "pad", "resize")
LABELS = ("auto", "folders", "none")
LANCZOS = Image.Resampling.LANCZOS
# An image that is shrunk a lot is first averaged over whole pixels down to at least GAP times its
# new size: many times as fast as LANCZOS alone, and hardly another picture.
GAP = 3.0


@dataclass(frozen=True)
class Reading:
    """How data are read; the arguments of `ddpm_edge.data.load`, checked.

    Attributes:
        size: (H, W) that every image is brought to, or None; see `height_width`.
        fit: one of FITS.
        labels: one of LABELS.
        progress: told (fraction, note) now and then.
    """

    size: tuple[int, int] | None = None
    fit: str = "crop"
    labels: str = "auto"
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        one_of("fit (--fit)", self.fit, FITS)
        one_of("labels (--labels)", self.labels, LABELS)


def height_width(size: Any) -> tuple[int, int] | None:
    """(H, W) of a pair or of one number for both; None stays."""
    if size is None:
        return None
    pair = size if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2:
        raise ConfigError(f"a size (--size) must be (H, W) or one number for both; got {size!r}")
    return whole("the height (--size)", pair[0]), whole("the width (--size)", pair[1])


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is not among the allowed ones."""
    if value not in allowed:
        words = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
        raise ConfigError(f"{name} must be {words}; got {value!r}")


def refuse_one_class(name: str, class_names: Iterable[str]) -> None:
    """Refuse labels that are all the same; `class_names` are those of the images there are."""
    present = list(class_names)
    if len(present) == 1:
        raise DataError(
            f"{name}: all images are of one class, {present[0]!r}; a label would say nothing: give "
            "--labels none, or add classes"
        )


def fitted(image: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    """An L or RGB image brought to `size` = (H, W), enlarged where it is smaller.

    See `ddpm_edge.data.load` for `fit`. Pixels are not touched where nothing must be scaled.
    """
    height, width = size
    if image.size == (width, height):
        return image
    if fit == "crop":
        return _crop(image, height, width)
    if fit == "pad":
        return _pad(image, height, width)
    return image.resize((width, height), LANCZOS, reducing_gap=GAP)


def _crop(image: Image.Image, height: int, width: int) -> Image.Image:
    has_width, has_height = image.size
    if (has_width == width and has_height > height) or (has_height == height and has_width > width):
        left, top = (has_width - width) // 2, (has_height - height) // 2  # whole pixels: no blur
        return image.crop((left, top, left + width, top + height))
    cut_width = min(has_width, has_height * width / height)
    cut_height = min(has_height, has_width * height / width)
    left_edge, top_edge = (has_width - cut_width) / 2, (has_height - cut_height) / 2
    box = (left_edge, top_edge, left_edge + cut_width, top_edge + cut_height)
    return image.resize((width, height), LANCZOS, box, reducing_gap=GAP)


def _pad(image: Image.Image, height: int, width: int) -> Image.Image:
    has_width, has_height = image.size
    if has_width * height >= has_height * width:
        inner = (width, max(1, round(has_height * width / has_width)))
    else:
        inner = (max(1, round(has_width * height / has_height)), height)
    sheet = Image.new(image.mode, (width, height), BACKGROUND)
    corner = (round((width - inner[0]) / 2), round((height - inner[1]) / 2))
    sheet.paste(image.resize(inner, LANCZOS, reducing_gap=GAP), corner)
    return sheet


def put(target: UInt8, image: Image.Image) -> None:
    """Write an L or RGB image into `target` (C, H, W)."""
    pixels: Array = np.asarray(image)  # (H, W) or (H, W, 3)
    target[...] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def allocate(name: str, shape: tuple[int, ...]) -> UInt8:
    """Uninitialised uint8 of `shape` (N, C, H, W).

    Raises:
        DataError: more than the machine's memory. Linux would promise it, and kill later.
    """
    need, there = int(np.prod(shape, dtype=object)), memory()
    try:
        if there is not None and need > there:
            raise MemoryError
        return np.empty(shape, np.uint8)
    except (MemoryError, ValueError) as error:  # ValueError: more than NumPy can address
        count, _, height, width = shape
        has = "" if there is None else f" of {there / 1e9:.1f} GB that this machine has"
        raise DataError(
            f"{name}: {count} images of {height}x{width} need {need / 1e9:.1f} GB of memory{has}; "
            "give a smaller --size, or fewer images"
        ) from error


def memory() -> int | None:
    """Bytes of main memory, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows; names that a system lacks
        return None


def counted(
    items: Iterable[T],
    total: int,
    note: str,
    progress: Progress | None,
    part: tuple[float, float] = (0.0, 1.0),
) -> Iterator[T]:
    """The items, and after about every hundredth of them a word to `progress`.

    `part` is where the first and the last of them lie in the whole work.
    """
    every = max(1, total // 100)
    for done, item in enumerate(items, start=1):
        yield item
        if progress is not None and (done % every == 0 or done == total):
            progress(part[0] + (part[1] - part[0]) * done / total, f"{note} {done} of {total}")
