"""Bringing images to a size, against Pillow's own functions; progress."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from ddpm_edge.data.reading import FITS, LANCZOS, counted, fitted

# Sizes (H, W) of images that are not shrunk by 6 or more in a direction: there LANCZOS is used
# alone, and the results are Pillow's to the bit.
NEAR = [(40, 40), (31, 57), (57, 31), (64, 64), (20, 90), (90, 20), (7, 9), (16, 24), (33, 25)]
SIZES = [(16, 16), (16, 24), (25, 16), (32, 31)]


def noise(size: tuple[int, int], mode: str) -> Image.Image:
    shape = (*size, 3) if mode == "RGB" else size
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def smooth(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [127.5 + 120 * np.sin(a * x + b * y) for a, b in ((9, 4), (-5, 11), (7, -8))]
    return Image.fromarray(np.stack(waves, axis=-1).round().astype(np.uint8))


def pillows(image: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    shape = size[::-1]
    if fit == "crop":
        return ImageOps.fit(image, shape, LANCZOS)
    if fit == "pad":
        return ImageOps.pad(image, shape, LANCZOS, color="white")
    return image.resize(shape, LANCZOS)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("near", NEAR)
def test_as_pillow_does(near: tuple[int, int], fit: str, mode: str) -> None:
    image = noise(near, mode)
    for size in SIZES:
        got = fitted(image, size, fit)
        assert got.size == size[::-1]
        assert got.mode == mode
        if fit == "crop" and any(a == b for a, b in zip(near, size, strict=True)):
            continue  # only cut, see the next test
        assert (np.asarray(got) == np.asarray(pillows(image, size, fit))).all()


@pytest.mark.parametrize(("has", "size"), [((16, 31), (16, 16)), ((39, 24), (16, 24))])
def test_what_must_only_be_cut_is_not_scaled(has: tuple[int, int], size: tuple[int, int]) -> None:
    """Pillow's fit blurs here: the middle of 31 pixels begins at 7.5."""
    image = noise(has, "RGB")
    top, left = (has[0] - size[0]) // 2, (has[1] - size[1]) // 2
    expected = np.asarray(image)[top : top + size[0], left : left + size[1]]
    assert (np.asarray(fitted(image, size, "crop")) == expected).all()
    assert (np.asarray(pillows(image, size, "crop")) != expected).any()


@pytest.mark.parametrize("fit", FITS)
def test_the_right_size_is_left_alone(fit: str) -> None:
    image = noise((16, 24), "RGB")
    assert (np.asarray(fitted(image, (16, 24), fit)) == np.asarray(image)).all()


def test_pad_does_not_scale_what_only_needs_a_border() -> None:
    image = noise((10, 24), "RGB")
    got = np.asarray(fitted(image, (16, 24), "pad"))
    assert (got[3:13] == np.asarray(image)).all()
    assert (got[:3] == 255).all()
    assert (got[13:] == 255).all()


@pytest.mark.parametrize("fit", FITS)
def test_shrinking_a_lot_stays_close(fit: str) -> None:
    """Averaging first changes a steep gradient at the border most: by 4 of 255, measured."""
    image = smooth(480, 640)
    got = np.asarray(fitted(image, (16, 16), fit), np.int64)
    differences = np.abs(got - np.asarray(pillows(image, (16, 16), fit)))
    assert differences.max() <= 5
    assert differences.mean() <= 0.5


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("has", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_extreme_shapes(has: tuple[int, int], fit: str) -> None:
    assert fitted(noise(has, "L"), (16, 24), fit).size == (24, 16)


def test_counted_tells_about_a_hundred_times() -> None:
    said: list[tuple[float, str]] = []
    items = list(counted(iter(range(8000)), 8000, "image", lambda *a: said.append(a), (0.5, 1.0)))
    assert items == list(range(8000))
    assert len(said) == 100
    assert said[0] == (0.505, "image 80 of 8000")
    assert said[-1] == (1.0, "image 8000 of 8000")
    assert list(counted([], 0, "image", None)) == []
