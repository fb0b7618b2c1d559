"""Images and files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_edge import save_grid, save_image
from ddpm_edge.errors import ConfigError
from ddpm_edge.files import atomic_write
from ddpm_edge.images import grid, read_image, to_images


def test_to_images_rounds_clips_and_transposes() -> None:
    x = np.array([-1.0, 1.0, 0.0, -3.0, 3.0, 1 / 127.5], np.float32).reshape(1, 3, 1, 2)
    assert to_images(x).tolist() == [[[[0, 128, 255], [255, 0, 128]]]]  # (1, 1, 2, 3)
    assert to_images(x, "float32").dtype == np.float32
    assert to_images(x, "float32")[0, 0, 1, 1] == -1.0


def test_every_grey_level_comes_back() -> None:
    levels = np.arange(256, dtype=np.float32).reshape(1, 1, 16, 16) / 127.5 - 1.0
    assert (to_images(levels).reshape(-1) == np.arange(256)).all()


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3)])
def test_png_round_trip(tmp_path: Path, shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    save_image(image, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert (np.asarray(opened) == image.reshape(4, 5, *shape[2:]).squeeze()).all()


def test_grid_layout() -> None:
    images = np.stack([np.full((2, 2, 1), i, np.uint8) for i in range(5)])
    sheet = grid(images, gap=1)[:, :, 0]
    assert sheet.shape == (7, 10)  # 2 rows of 3
    assert sheet[1:3, 1:3].tolist() == [[0, 0], [0, 0]]
    assert sheet[4:6, 4:6].tolist() == [[4, 4], [4, 4]]
    assert (sheet[4:6, 7:9] == 255).all()
    assert (sheet[::3] == 255).all()


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 4, 4, 1)), np.zeros((4, 4, 1), np.uint8), np.zeros((0, 4, 4, 1), np.uint8)],
)
def test_what_is_no_grid(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="a grid needs uint8 images"):
        save_grid(images, tmp_path / "a.png")
    with pytest.raises(ConfigError, match="a PNG needs uint8"):
        save_image(np.zeros((2, 2, 4), np.uint8), tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"written as \.png; got .*a\.jpg"):
        save_image(np.zeros((2, 2, 3), np.uint8), tmp_path / "a.jpg")
    assert os.listdir(tmp_path) == []


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    with atomic_write(tmp_path / "atomic"):
        pass
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")}
    assert len(modes) == 1


def test_read_image(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    save_image(rgb, tmp_path / "rgb.png")
    assert (read_image(tmp_path / "rgb.png") == rgb).all()
    gray = read_image(tmp_path / "rgb.png", 1)
    assert gray.shape == (6, 4, 1)
    assert np.abs(gray[..., 0] - rgb @ [0.299, 0.587, 0.114]).max() <= 1  # ITU-R 601-2, rounded
    turned = Image.Exif()
    turned[274] = 6  # orientation: a quarter turn
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=turned)
    assert (read_image(tmp_path / "turned.png") == np.rot90(rgb, -1)).all()
    Image.fromarray(rgb).convert("P").save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").shape == (6, 4, 3)


@pytest.mark.parametrize(
    ("mode", "channels"), [("RGBA", 3), ("RGBA", 1), ("LA", 1), ("LA", 3), ("P", 3)]
)
def test_what_is_transparent_is_white(tmp_path: Path, mode: str, channels: int) -> None:
    """As in images for training (data/image_folder.py); what is hidden there is not seen."""
    rgba = np.zeros((2, 3, 4), np.uint8)  # black, opaque in the last column alone
    rgba[:, 1, 3], rgba[:, 2, 3] = 51, 255
    image = Image.fromarray(rgba)
    if mode == "P":
        image = Image.fromarray(np.array([[0, 0, 1]] * 2, np.uint8), "P")
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.save(tmp_path / "a.png", transparency=0)
        expected = [255, 255, 0]
    else:
        image.convert(mode).save(tmp_path / "a.png")
        expected = [255, 204, 0]
    seen = read_image(tmp_path / "a.png", channels)
    assert seen.shape == (2, 3, channels)
    assert (seen == np.array(expected)[:, None]).all()
