"""Reading training data."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from ddpm_edge.errors import DataError
from ddpm_edge.train import data

IMAGES = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
LABELS = np.array([2, 0, 1])


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray, packed: bool = True) -> None:
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        content = head + array.astype(np.uint8).tobytes()
        if packed:
            (folder / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(content))
        else:
            (folder / f"train-{name}-ubyte").write_bytes(content)


@pytest.mark.parametrize("packed", [True, False])
def test_idx_folder(tmp_path: Path, packed: bool) -> None:
    write_idx(tmp_path, IMAGES, LABELS, packed)
    loaded = data.load(str(tmp_path))
    assert (loaded.images[:, 0] == IMAGES).all()
    assert loaded.labels is not None
    assert loaded.labels.tolist() == [2, 0, 1]
    assert loaded.class_names == ("0", "1", "2")
    assert loaded.sample_shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("images", "shape"),
    [(IMAGES, (1, 4, 4)), (np.zeros((2, 4, 6, 3), np.uint8), (3, 4, 6))],
)
def test_npz(tmp_path: Path, images: np.ndarray, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "set.npz", images=images)
    loaded = data.load(str(tmp_path / "set.npz"))
    assert loaded.sample_shape == shape
    assert loaded.labels is None
    assert loaded.class_names == ()


def test_npz_with_names(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, images=IMAGES, labels=LABELS, class_names=np.array(["a", "b", "c", "d"]))
    assert data.load(str(path)).class_names == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": IMAGES}, r"has no array `images`; it holds \['x'\]"),
        ({"images": IMAGES / 255}, "images must be uint8 in 0..255; got float64"),
        ({"images": np.zeros((2, 4, 4, 2), np.uint8)}, r"got \(2, 4, 4, 2\)"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, r"N >= 1; got \(0, 4, 4, 1\)"),
        ({"images": IMAGES, "labels": LABELS[:2]}, "labels must be 3 whole numbers"),
        ({"images": IMAGES, "labels": LABELS - 1}, "labels must be 3 whole numbers >= 0"),
        ({"images": IMAGES, "labels": LABELS + 0.5}, "got float64"),
        ({"images": IMAGES, "labels": LABELS, "class_names": ["a"]}, "1 class names for 3 labels"),
        ({"images": np.array([None])}, "cannot be read as .npz"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=message):
        data.load(str(tmp_path / "set.npz"))


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "set.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match="cannot be read as .npz"):
        data.load(str(tmp_path / "set.npz"))
    with pytest.raises(DataError, match="it must hold the four IDX files"):
        data.load(str(tmp_path))
    write_idx(tmp_path, IMAGES, LABELS)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-12])
    with pytest.raises(DataError, match="is damaged"):
        data.load(str(tmp_path))
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(DataError, match="cut short"):
        data.load(str(tmp_path))


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no data at 'mnist'; *|no data at 'mnist': expected"):
        data.load("mnist")
    monkeypatch.setattr(data, "FASHION_MNIST_PATH", tmp_path / "gone")
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        data.load("fashion-mnist")


@pytest.mark.skipif(not data.FASHION_MNIST_PATH.is_dir(), reason="Fashion-MNIST is not installed")
def test_fashion_mnist() -> None:
    train, test = data.load("fashion-mnist"), data.load("fashion-mnist", split="test")
    assert train.images.shape == (60_000, 1, 28, 28)
    assert test.images.shape == (10_000, 1, 28, 28)
    assert np.bincount(train.labels).tolist() == [6000] * 10  # type: ignore[arg-type]
    assert train.class_names[7] == "sneaker"
