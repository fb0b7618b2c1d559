"""Images and masks as callers give them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from ddpm_edge.errors import ConfigError
from ddpm_edge.images import ImageWarning, from_images, to_images, to_mask

GRAY, RGB = (1, 6, 4), (3, 6, 4)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("shape", "sample", "count"),
    [
        ((6, 4), GRAY, 1), ((6, 4, 1), GRAY, 1), ((5, 6, 4), GRAY, 5), ((5, 6, 4, 1), GRAY, 5),
        ((6, 4, 3), RGB, 1), ((5, 6, 4, 3), RGB, 5), ((1, 1), (1, 1, 1), 1),
        ((5, 1, 1), (1, 1, 1), 5), ((5, 1, 1, 1), (1, 1, 1), 5),
    ],
)  # fmt: skip
def test_shapes(shape: tuple[int, ...], sample: tuple[int, ...], count: int) -> None:
    images = RNG.integers(0, 256, shape, np.uint8)
    states = from_images(images, sample)
    assert states.shape == (count, *sample)
    assert states.dtype == np.float32
    assert states.flags.c_contiguous
    assert (to_images(states).reshape(shape) == images).all()


def test_every_level_and_every_float() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    states = from_images(levels, (1, 16, 16))
    assert states.min() == -1.0
    assert states.max() == 1.0
    assert (to_images(states)[0, :, :, 0] == levels).all()
    for dtype in (np.float16, np.float32, np.float64):
        again = from_images(states[0, 0].astype(dtype), (1, 16, 16))  # (H, W)
        assert again.dtype == np.float32
        assert np.abs(again - states).max() <= (1e-3 if dtype == np.float16 else 1e-7)
    assert from_images(states[0, 0] * 1.0001, (1, 16, 16)).max() == 1.0  # rounding is cut


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 6), np.uint8), r"photo must be \(6, 4, 1\) .*got \(4, 6\): crop or resize"),
        (np.zeros((6, 4, 3), np.uint8), r"got \(6, 4, 3\)"),
        (np.zeros((0, 6, 4), np.uint8), r"got \(0, 6, 4, 1\)"),
        (np.zeros((2, 2, 6, 4, 1), np.uint8), "got"),
        (np.zeros((6, 4), np.int64), "got int64: give np.asarray"),
        (np.zeros((6, 4), bool), "got bool"),
        (np.full((6, 4), np.nan), r"in \[nan, nan\]: scale it"),
        (np.full((6, 4), 200.0), r"\[200, 200\]: these look like \[0, 255\]: give uint8"),
        (np.full((6, 4), -2.0), r"\[-2, -2\]: scale it"),
        ("photo.png", r"photo must be an array of numbers; got 'photo.png' \(str"),
        (None, r"got None \(NoneType\)"),
        ([[1.0], [1.0, 2.0]], "photo must be an array of numbers; setting an array element"),
    ],
)
def test_images_that_are_refused(images: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_images(images, GRAY, "photo")


def test_floats_of_0_to_1_are_told() -> None:
    with pytest.warns(ImageWarning, match=r"float32 in \[0, 1\], which looks like \[0, 1\]"):
        from_images(np.linspace(0, 1, 24, dtype=np.float32).reshape(6, 4), GRAY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_images(np.linspace(-1, 1, 24).reshape(6, 4), GRAY)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
@pytest.mark.parametrize("value", [1, 255])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 1), (2, 6, 4), (2, 6, 4, 1)])
def test_masks(dtype: type, value: int, shape: tuple[int, ...]) -> None:
    mask = np.zeros(shape, dtype)
    inner = mask[..., 0] if shape[-1] == 1 else mask
    inner[..., 2:4, 1:3] = value
    got = to_mask(mask)
    assert got.dtype == bool
    assert got.shape == (2 if len(shape) > 2 and shape[0] == 2 else 1, 6, 4)
    assert (got == (inner != 0)).all()


HALF = np.eye(6, 4)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (HALF * 0, "the mask is empty, nothing would be painted"),
        (HALF * 0 + 1, "the mask is full, no pixel would be known"),
        (np.stack([HALF, HALF * 0]), r"mask 1 of 2 \(from \(2, 6, 4\)\) is empty"),
        (HALF * 2, "0 and 255 .*got float64 with .*2"),
        (HALF * np.nan, "got float64 with .*nan"),
        (HALF * 255 + np.roll(HALF, 1, 1), "threshold it"),
        (-HALF, "threshold it"),
        (np.full((6, 4), "a"), "a mask must be an array of numbers"),
        (np.zeros((6, 4, 3)), r"mask 0 of 6 \(from \(6, 4, 3\)\) is empty"),
        (np.zeros(6), r"got \(6,\)"),
        (np.zeros((0, 4)), r"got \(0, 4\)"),
        (np.zeros((1, 2, 6, 4)), r"got \(1, 2, 6, 4\)"),
    ],
)
def test_masks_that_are_refused(mask: np.ndarray, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_mask(mask)
