"""Training data in arrays: IDX files, .npz and .npy."""

from __future__ import annotations

import gzip
import os
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_edge.arrays import Array, Int64, UInt8
from ddpm_edge.data.dataset import Dataset
from ddpm_edge.data.reading import Reading, allocate, counted, fitted, put, refuse_one_class
from ddpm_edge.errors import DataError

IDX_PARTS = {"train": "train", "test": "t10k"}  # what the files of each split are called
IDX_NAME = re.compile(r"(train|t10k)-(images-idx3|labels-idx1)-ubyte(\.gz)?")
DAMAGED = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def holds_idx(folder: Path) -> bool:
    """Whether some file directly in the folder is called as IDX files are."""
    return any(IDX_NAME.fullmatch(name) for name in os.listdir(folder))


def read_idx(folder: Path, split: str, class_names: tuple[str, ...], reading: Reading) -> Dataset:
    """The "train" or "test" images of a folder of the four IDX files."""
    part = IDX_PARTS[split]
    images = _idx(folder, f"{part}-images-idx3-ubyte", dimensions=3)
    labels = None
    if reading.labels != "none":
        labels = _idx(folder, f"{part}-labels-idx1-ubyte", dimensions=1)
    return _dataset(folder.resolve().name, images, labels, class_names, reading)


def _idx(folder: Path, stem: str, dimensions: int) -> Array:
    """An IDX file of unsigned bytes, gzipped or not (the format of LeCun's MNIST page)."""
    found = [p for p in (folder / f"{stem}.gz", folder / stem) if p.is_file()]
    if not found:
        raise DataError(f"{folder} has no {stem}.gz or {stem}; it must hold the four IDX files")
    path = found[0]
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}; copy it again") from error
    head = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(data[4:head], ">u4").tolist())
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != head + int(np.prod(shape)):
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes with {dimensions} dimensions, or it is "
            f"cut short ({len(data)} bytes); copy it again"
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def read_npz(path: Path, reading: Reading) -> Dataset:
    """An .npz file with `images` and, optionally, `labels` and `class_names`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except DAMAGED as error:
        raise DataError(f"{path} cannot be read as .npz: {error}") from error
    if "images" not in arrays:
        raise DataError(f"{path} has no array `images`; it holds {sorted(arrays) or 'nothing'}")
    names = tuple(str(name) for name in arrays.get("class_names", ()))
    return _dataset(path.stem, arrays["images"], arrays.get("labels"), names, reading)


def read_npy(path: Path, reading: Reading) -> Dataset:
    """An .npy file of images, mapped and not read whole, so that memory holds them once."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGED as error:
        raise DataError(f"{path} cannot be read as .npy: {error}") from error
    return _dataset(path.stem, images, None, (), reading)


def _dataset(
    name: str,
    images: Array,
    labels: Array | None,
    class_names: tuple[str, ...],
    reading: Reading,
) -> Dataset:
    if reading.labels == "folders":
        raise DataError(
            f"{name}: --labels folders needs a folder of images with a folder for each class, and "
            "these are arrays; give --labels auto or none"
        )
    images = _checked_images(name, images)
    if reading.labels == "none":
        labels = None
    if labels is not None:
        labels, class_names = _checked_labels(name, labels, class_names, len(images))
    return Dataset(
        name=name,
        images=_channels_first(name, images, reading),
        labels=labels,
        class_names=class_names if labels is not None else (),
    )


def _checked_images(name: str, images: Array) -> UInt8:
    """The images as uint8 (N, H, W, C)."""
    if images.dtype != np.uint8:
        raise DataError(
            f"{name}: images must be uint8 in 0..255; got {images.dtype}{_remedy(images)}"
        )
    if images.ndim == 3:
        images = images[..., None]  # (N, H, W, 1)
    if images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        first = images.ndim == 4 and images.shape[1] in (1, 3)
        raise DataError(
            f"{name}: images must be (N, H, W), (N, H, W, 1) or (N, H, W, 3) with N >= 1; got "
            f"{images.shape}" + ("; give images.transpose(0, 2, 3, 1)" if first else "")
        )
    return images


def _remedy(images: Array) -> str:
    """How to make uint8 of images of another dtype, for an error message."""
    if not images.size or images.dtype.kind not in "fiub":
        return ""
    low, high = images.min(), images.max()
    if images.dtype.kind == "b":
        how = "x.astype(np.uint8) * 255"
    elif low < -1 or high > 255:
        how = "bring them to 0..255, then x.round().astype(np.uint8)"
    elif low < 0:
        how = "((x + 1) * 127.5).round().astype(np.uint8)"
    elif images.dtype.kind == "f" and not high > 1:
        how = "(x * 255).round().astype(np.uint8)"
    else:
        how = "x.round().astype(np.uint8)"
    return f" from {low:g} to {high:g}; convert them: {how}"


def _checked_labels(
    name: str, labels: Array, class_names: tuple[str, ...], images: int
) -> tuple[Int64, tuple[str, ...]]:
    if labels.shape != (images,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise DataError(
            f"{name}: labels must be {images} whole numbers >= 0, one an image; got "
            f"{labels.dtype} {labels.shape}"
        )
    count = max(int(labels.max()) + 1, len(class_names))
    class_names = class_names or tuple(str(i) for i in range(count))
    if len(class_names) != count:
        raise DataError(f"{name}: {len(class_names)} class names for {count} labels")
    refuse_one_class(name, (class_names[i] for i in np.unique(labels)))
    return labels.astype(np.int64), class_names


def _channels_first(name: str, images: UInt8, reading: Reading) -> UInt8:
    """Images (N, H, W, C), of the size that is asked for, as a new array (N, C, H, W)."""
    count, height, width, channels = images.shape
    size = reading.size or (height, width)
    planes = allocate(name, (count, channels, *size))
    if size == (height, width):
        planes[...] = images.transpose(0, 3, 1, 2)
        if reading.progress is not None:
            reading.progress(1.0, f"image {count} of {count}")
        return planes
    for i in counted(range(count), count, "image", reading.progress):
        pixels = images[i, :, :, 0] if channels == 1 else images[i]
        put(planes[i], fitted(Image.fromarray(pixels), size, reading.fit))
    return planes
