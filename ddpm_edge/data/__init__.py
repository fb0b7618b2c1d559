"""Reading images, and their labels where there are any: uint8, all in memory; no torch."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddpm_edge.data.array_files import holds_idx, read_idx, read_npy, read_npz
from ddpm_edge.data.dataset import Dataset, mixed, select, split
from ddpm_edge.data.image_folder import read_folder
from ddpm_edge.data.reading import SPLITS, Progress, Reading, height_width, one_of
from ddpm_edge.errors import ConfigError, DataError

__all__ = [
    "Dataset",
    "Source",
    "has_test_images",
    "load",
    "mixed",
    "parse_size",
    "select",
    "split",
]

FASHION_MNIST = "fashion-mnist"
FASHION_MNIST_PATH = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist
FASHION_MNIST_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
ARRAY_READERS = {".npz": read_npz, ".npy": read_npy}


def load(
    source: str | Path,
    split: str = "train",
    *,
    size: tuple[int, int] | int | None = None,
    fit: str = "crop",
    labels: str = "auto",
    progress: Progress | None = None,
) -> Dataset:
    """Read a data set.

    A folder of images is read with its sub-folders, sorted by the paths inside it: files that end
    in .png .jpg .jpeg .bmp .webp .tif .tiff or .gif, of which the first picture counts; hidden and
    other files are passed over. The images are gray (C = 1) if every file is gray (Pillow's modes
    1 and L), else RGB. EXIF's orientation is applied, transparency is laid on white, colour
    profiles are ignored, and more than 8 bits a channel are refused: how to cut them down to 8
    depends on what they mean.

    Args:
        source: one of
            - "fashion-mnist": the Debian package's files,
            - a folder of images, or one that holds four IDX files as Fashion-MNIST's,
            - an .npz file with `images` uint8 (N, H, W) or (N, H, W, C), C = 1 or 3, and,
              optionally, `labels` (N,) and `class_names`,
            - an .npy file of such images.
        split: "train" or "test"; only IDX files have test images. See also the function `split`.
        size: (H, W), or one number for both, that every image is brought to. None: as they are,
            all of one size.
        fit: what happens to images of another size than `size`.
            - "crop": scaled to cover it, and the middle cut out,
            - "pad": scaled to lie inside it, in the middle of white, because transparency is laid
              on white too: what is not there then looks the same in every image,
            - "resize": stretched.
        labels: "auto", labels where the data have them: `labels` of an .npz, IDX labels, or the
            sub-folders of `source` that the images are in, sorted by name; "folders", such
            sub-folders must be there; "none", no labels.
        progress: called now and then with (fraction done, note).

    Raises:
        DataError: nothing there, no permission, not images as described, files that are damaged or
            cannot be used (all of them are named), images of several sizes without `size`, images
            beside class folders, labels that are all the same, or more than fits into memory.
        ConfigError: `split`, `size`, `fit` or `labels` has a value that it cannot have.
    """
    one_of("split", split, SPLITS)
    reading = Reading(height_width(size), fit, labels, progress)
    try:
        return _load(source, split, reading)
    except PermissionError as error:
        raise DataError(
            f"no permission to read {error.filename or source}; change its permissions, or give a "
            "copy"
        ) from error
    except OSError as error:  # links in a circle, a disk that fails, ...
        raise DataError(f"{source} cannot be read: {error}") from error


def _load(source: str | Path, split: str, reading: Reading) -> Dataset:
    path = Path(source)
    if str(source) == FASHION_MNIST:
        if not FASHION_MNIST_PATH.is_dir():
            raise DataError(
                f"Fashion-MNIST is not at {FASHION_MNIST_PATH}: install it with "
                "`apt-get install dataset-fashion-mnist`, or give the folder that holds its four "
                "*-ubyte.gz files instead of the name"
            )
        return read_idx(FASHION_MNIST_PATH, split, FASHION_MNIST_CLASSES, reading)
    if path.is_dir() and holds_idx(path):
        names = FASHION_MNIST_CLASSES if "fashion" in path.name.lower() else ()
        return read_idx(path, split, names, reading)
    read = read_folder if path.is_dir() else ARRAY_READERS.get(path.suffix.lower())
    if read is None or not path.exists():
        what = "that file is none of these" if path.exists() else "nothing is there"
        raise DataError(
            f"no data at {str(source)!r}: expected the name {FASHION_MNIST!r}, a folder of images "
            f"or of IDX files, or an .npz or .npy file; {what}"
        )
    if split != "train":
        raise DataError(f"{source} has no test images; give a folder of IDX files")
    return read(path, reading)


def has_test_images(source: str | Path) -> bool:
    """Whether `load` knows test images of it."""
    path = Path(source)
    return str(source) == FASHION_MNIST or (path.is_dir() and holds_idx(path))


@dataclass(frozen=True)
class Source:
    """How the data of a run are read: the arguments of `load` and `split`, kept in its config."""

    data: str
    size: tuple[int, int] | None = None
    fit: str = "crop"
    labels: str = "auto"
    validation: float = 0.0  # share held out; 0 = none
    seed: int = 0

    def read(self, progress: Progress | None = None) -> tuple[Dataset, Dataset | None]:
        """The images for training, and those held out."""
        images = load(
            self.data, size=self.size, fit=self.fit, labels=self.labels, progress=progress
        )
        if not self.validation:
            return images, None
        return split(images, self.validation, self.seed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; a path is written so that it can be found from anywhere."""
        path = Path(self.data)
        return asdict(self) | ({"data": str(path.absolute())} if path.exists() else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Source:
        """The inverse of `to_dict`."""
        return cls(**{**values, "size": values.get("size") and tuple(values["size"])})


def parse_size(text: str) -> tuple[int, int]:
    """(H, W) of "64" (both) or "48x64" (height x width).

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,5})(?:x([1-9][0-9]{0,5}))?", text.strip().lower())
    if match is None:
        raise ConfigError(
            f"a size (--size) must be a number of pixels >= 1, as 64, or height x width, as 48x64; "
            f"got {text!r}"
        )
    height, width = match[1], match[2] or match[1]
    return int(height), int(width)
