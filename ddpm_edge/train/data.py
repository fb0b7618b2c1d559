"""Training data: uint8 images and, where there are any, labels."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.errors import DataError
from ddpm_edge.train.dataset import Dataset, select, split

__all__ = ["Dataset", "load", "select", "split"]

FASHION_MNIST = "fashion-mnist"
FASHION_MNIST_PATH = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist
FASHION_MNIST_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip


def load(source: str, split: str = "train") -> Dataset:
    """Read a data set.

    Args:
        source: "fashion-mnist" (the Debian package's files), a folder that holds the same four IDX
            files, or an .npz file with `images` uint8 (N, H, W) or (N, H, W, C) and, optionally,
            `labels` (N,) and `class_names`.
        split: "train" or "test", for IDX files.

    Raises:
        DataError: nothing there, or not images as described.
    """
    if source == FASHION_MNIST:
        if not FASHION_MNIST_PATH.is_dir():
            raise DataError(
                f"Fashion-MNIST is not at {FASHION_MNIST_PATH}: install it with "
                "`apt-get install dataset-fashion-mnist`, or give the folder that holds its four "
                "*-ubyte.gz files instead of the name"
            )
        return _load_idx(FASHION_MNIST_PATH, split, FASHION_MNIST_CLASSES)
    path = Path(source)
    if path.is_dir():
        names = FASHION_MNIST_CLASSES if "fashion" in path.name.lower() else ()
        return _load_idx(path, split, names)
    if path.suffix == ".npz" and path.is_file():
        return _load_npz(path)
    raise DataError(
        f"no data at {source!r}: expected the name {FASHION_MNIST!r}, a folder of IDX files or an "
        ".npz file"
    )


def _load_idx(folder: Path, split: str, class_names: tuple[str, ...]) -> Dataset:
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", dimensions=1)
    return _checked(str(folder.name), images, labels, class_names)


def _read_idx(folder: Path, stem: str, dimensions: int) -> Array:
    """An IDX file of unsigned bytes, gzipped or not (the format of LeCun's MNIST page)."""
    found = [p for p in (folder / f"{stem}.gz", folder / stem) if p.is_file()]
    if not found:
        raise DataError(f"{folder} has no {stem}.gz or {stem}; it must hold the four IDX files")
    path = found[0]
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path} is damaged: {error}; copy it again") from error
    head = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(data[4:head], ">u4").tolist())
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != head + int(np.prod(shape)):
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes with {dimensions} dimensions, or it is "
            f"cut short ({len(data)} bytes); copy it again"
        )
    return np.frombuffer(bytearray(data), np.uint8, offset=head).reshape(shape)


def _load_npz(path: Path) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}") from error
    if "images" not in arrays:
        raise DataError(f"{path} has no array `images`; it holds {sorted(arrays) or 'nothing'}")
    names = tuple(str(name) for name in arrays.get("class_names", ()))
    return _checked(path.stem, arrays["images"], arrays.get("labels"), names)


def _checked(
    name: str, images: Array, labels: Array | None, class_names: tuple[str, ...]
) -> Dataset:
    if images.dtype != np.uint8:
        raise DataError(f"{name}: images must be uint8 in 0..255; got {images.dtype}")
    if images.ndim == 3:
        images = images[..., None]  # (N, H, W, 1)
    if images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        raise DataError(
            f"{name}: images must be (N, H, W), (N, H, W, 1) or (N, H, W, 3) with N >= 1; got "
            f"{images.shape}"
        )
    if labels is not None:
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise DataError(
                f"{name}: labels must be {len(images)} whole numbers >= 0, one an image; got "
                f"{labels.dtype} {labels.shape}"
            )
        count = max(int(labels.max()) + 1, len(class_names))
        class_names = class_names or tuple(str(i) for i in range(count))
        if len(class_names) != count:
            raise DataError(f"{name}: {len(class_names)} class names for {count} labels")
        labels = labels.astype(np.int64)
    return Dataset(
        name=name,
        images=np.ascontiguousarray(images.transpose(0, 3, 1, 2)),  # (N, C, H, W)
        labels=labels,
        class_names=class_names if labels is not None else (),
    )
