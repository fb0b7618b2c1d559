"""Reading training data."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ddpm_edge import data
from ddpm_edge.data import reading
from ddpm_edge.errors import ConfigError, DataError

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
        ({"images": IMAGES, "labels": LABELS * 0 + 3}, "of one class, '3'; .*: give --labels none"),
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
    write_idx(tmp_path, IMAGES, LABELS)
    with pytest.raises(DataError, match="t10k-images.*it must hold the four IDX files"):
        data.load(str(tmp_path), "test")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-12])
    with pytest.raises(DataError, match="is damaged"):
        data.load(str(tmp_path))
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(DataError, match="cut short"):
        data.load(str(tmp_path))


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no data at 'mnist': expected .*; nothing is there"):
        data.load("mnist")
    (tmp_path / "a.zip").touch()
    with pytest.raises(DataError, match="that file is none of these"):
        data.load(tmp_path / "a.zip")
    monkeypatch.setattr(data, "FASHION_MNIST_PATH", tmp_path / "gone")
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        data.load("fashion-mnist")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES / 255, r"float64 from 0 to 0.18.*: \(x \* 255\).round\(\).astype\(np.uint8\)$"),
        (IMAGES / 24 - 1, r"from -1 to 0.9.*: \(\(x \+ 1\) \* 127.5\).round\(\).astype"),
        (IMAGES.astype(np.float32), r"float32 from 0 to 47; convert them: x.round\(\).astype"),
        (IMAGES.astype(np.uint16), "uint16 from 0 to 47; convert them: x.round"),
        (IMAGES.astype(np.uint16) * 100, "from 0 to 4700; convert them: bring them to 0..255"),
        (IMAGES > 3, r"bool from 0 to 1; convert them: x.astype\(np.uint8\) \* 255"),
        (IMAGES.astype("S2"), r"images must be uint8 in 0..255; got \|S2$"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"\(2, 3, 8, 8\); give images.transpose\(0, 2, 3, 1\)"),
        (np.zeros((8, 8), np.uint8), r"N >= 1; got \(8, 8\)$"),
    ],
)
def test_bad_npy(tmp_path: Path, images: np.ndarray, message: str) -> None:
    np.save(tmp_path / "set.npy", images)
    with pytest.raises(DataError, match=message):
        data.load(tmp_path / "set.npy")


def test_the_conversions_that_errors_advise() -> None:
    """Images in [0, 1] and [-1, 1] made from all byte values come back as they were."""
    x = np.arange(256) / 255
    assert ((x * 255).round().astype(np.uint8) == np.arange(256)).all()
    x = (np.arange(256) / 127.5 - 1).astype(np.float32)
    assert (((x + 1) * 127.5).round().astype(np.uint8) == np.arange(256)).all()


@pytest.mark.parametrize("shape", [(5, 4, 6), (5, 4, 6, 1), (5, 4, 6, 3)])
def test_npy(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.save(tmp_path / "set.npy", images)
    loaded = data.load(tmp_path / "set.npy")
    assert (loaded.images == images.reshape(5, 4, 6, -1).transpose(0, 3, 1, 2)).all()
    assert loaded.images.flags.c_contiguous
    assert loaded.images.flags.writeable  # torch warns of arrays that are not
    assert not isinstance(loaded.images, np.memmap)
    assert (loaded.labels, loaded.files, loaded.names) == (None, (), ("0", "1", "2", "3", "4"))


def test_a_cut_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "set.npy", IMAGES)
    (tmp_path / "set.npy").write_bytes((tmp_path / "set.npy").read_bytes()[:-1])
    with pytest.raises(DataError, match="cannot be read as .npy"):
        data.load(tmp_path / "set.npy")


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_are_brought_to_a_size(tmp_path: Path, channels: int) -> None:
    images = np.random.default_rng(1).integers(0, 256, (3, 12, 20, channels), np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=LABELS)
    said: list[tuple[float, str]] = []
    loaded = data.load(
        tmp_path / "set.npz", size=8, progress=lambda fraction, note: said.append((fraction, note))
    )
    assert loaded.sample_shape == (channels, 8, 8)
    assert loaded.labels is not None
    for image, got in zip(images, loaded.images, strict=True):
        source = Image.fromarray(image[..., 0] if channels == 1 else image)
        expected = np.asarray(ImageOps.fit(source, (8, 8), reading.LANCZOS))
        assert (got.transpose(1, 2, 0) == expected.reshape(8, 8, channels)).all()
    assert said[-1] == (1.0, "image 3 of 3")
    assert data.load(tmp_path / "set.npz", size=(8, 10), fit="pad").sample_shape[1:] == (8, 10)
    untouched = data.load(tmp_path / "set.npz", size=(12, 20), fit="resize")
    assert (untouched.images == images.transpose(0, 3, 1, 2)).all()


def test_idx_is_brought_to_a_size(tmp_path: Path) -> None:
    write_idx(tmp_path, IMAGES, LABELS)
    assert data.load(tmp_path, size=(2, 3)).sample_shape == (1, 2, 3)


def test_labels_of_arrays(tmp_path: Path) -> None:
    write_idx(tmp_path, IMAGES, LABELS)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    np.savez(tmp_path / "set.npz", images=IMAGES, labels=LABELS)
    for source in (tmp_path, tmp_path / "set.npz"):  # labels need not even be there
        loaded = data.load(source, labels="none")
        assert (loaded.labels, loaded.class_names) == (None, ())
    with pytest.raises(DataError, match="set: --labels folders needs a folder of images"):
        data.load(tmp_path / "set.npz", labels="folders")


def test_only_idx_files_have_test_images(tmp_path: Path) -> None:
    np.save(tmp_path / "set.npy", IMAGES)
    with pytest.raises(DataError, match="set.npy has no test images; give a folder of IDX files"):
        data.load(tmp_path / "set.npy", "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "validation"}, "split must be train or test; got 'validation'"),
        ({"fit": "stretch"}, r"fit \(--fit\) must be crop, pad or resize; got 'stretch'"),
        ({"labels": "yes"}, r"labels \(--labels\) must be auto, folders or none; got 'yes'"),
        ({"size": 0}, r"the height \(--size\) must be a whole number >= 1; got 0"),
        ({"size": (8, -1)}, r"the width \(--size\) must be a whole number >= 1; got -1"),
        ({"size": 8.0}, "got 8.0"),
        ({"size": True}, "got True"),
        ({"size": "64"}, "got '64'"),
        ({"size": (8, 8, 3)}, r"\(H, W\) or one number for both; got \(8, 8, 3\)"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data.load(tmp_path, **options)  # type: ignore[arg-type]


def test_numpy_numbers_are_sizes(tmp_path: Path) -> None:
    np.save(tmp_path / "set.npy", IMAGES)
    assert data.load(tmp_path / "set.npy", size=np.int64(2)).sample_shape == (1, 2, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"), [("64", (64, 64)), ("48x64", (48, 64)), (" 48X64 ", (48, 64)), ("1", (1, 1))]
)
def test_parse_size(text: str, size: tuple[int, int]) -> None:
    assert data.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "64x0", "-1", "64x", "x64", "6 4", "64x64x3", "1e3", "6.4", "٦٤", "9999999"]
)
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match=r"a size \(--size\) must be .* as 48x64; got"):
        data.parse_size(text)


def test_more_than_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "set.npy", IMAGES)
    monkeypatch.setattr(reading, "memory", lambda: 10**9)
    with pytest.raises(
        DataError,
        match="set: 3 images of 20000x20000 need 1.2 GB of memory of 1.0 GB that this machine has; "
        "give a smaller --size",
    ):
        data.load(tmp_path / "set.npy", size=20_000)
    monkeypatch.setattr(reading, "memory", lambda: None)  # the system does not tell, but refuses
    with pytest.raises(DataError, match="need 300.*GB of memory; give a smaller"):
        data.load(tmp_path / "set.npy", size=10**10)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "set.npy", IMAGES)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(DataError, match="cannot be read as .npy: .*Permission denied"):
        data.load(tmp_path / "set.npy")
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match="no permission to read somewhere; change its permissions"):
        data.load(tmp_path)


@pytest.mark.skipif(not data.FASHION_MNIST_PATH.is_dir(), reason="Fashion-MNIST is not installed")
def test_fashion_mnist() -> None:
    train, test = data.load("fashion-mnist"), data.load("fashion-mnist", split="test")
    assert train.images.shape == (60_000, 1, 28, 28)
    assert test.images.shape == (10_000, 1, 28, 28)
    assert np.bincount(train.labels).tolist() == [6000] * 10  # type: ignore[arg-type]
    assert train.class_names[7] == "sneaker"
