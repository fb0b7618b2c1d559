"""Training data in a folder of image files."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ddpm_edge.arrays import Int64, UInt8
from ddpm_edge.data.dataset import Dataset, listed
from ddpm_edge.data.reading import (
    GAP,
    Reading,
    allocate,
    counted,
    fitted,
    put,
    refuse_one_class,
)
from ddpm_edge.errors import DataError
from ddpm_edge.images import ALPHA, flat

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # what Pillow may take a file for
GRAY = ("1", "L")
MODES = (*GRAY, *ALPHA, "P", "RGB", "RGBX", "CMYK", "YCbCr")
DEEP = re.compile(r";16[BLN]")  # in Pillow's raw modes: 16 bits a channel, of which it keeps 8
TURNS = {  # EXIF's orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIZES_SHOWN = 5
HEADERS = 0.1  # about the share of the work that opening every file is
THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes and scales without Python's lock


class Header(NamedTuple):
    """What a file says before its pixels are decoded."""

    gray: bool
    size: tuple[int, int] | None  # (H, W), upright; None when not asked for


def read_folder(folder: Path, reading: Reading) -> Dataset:
    """All images in a folder and its sub-folders, sorted by their paths in it.

    Every file is opened first, which is quick and tells the number of channels and mixed sizes;
    then every file is decoded into its place, also after one has failed: the error names them all.

    Raises:
        DataError: see `ddpm_edge.data.load`.
    """
    files = find(folder)
    if not files:
        raise DataError(
            f"{folder} holds no images: no file in it or in its sub-folders ends in "
            f"{', '.join(ENDINGS)}, and no IDX file lies in it"
        )
    labels, class_names = class_labels(folder, files, reading.labels)
    name = folder.resolve().name
    headers, broken = _headers(folder, files, reading)
    if not headers:
        raise _unusable(folder, files, broken)
    size = reading.size or _common_size(folder, headers)
    mode = "L" if all(header.gray for header in headers.values()) else "RGB"
    pixels = allocate(name, (len(files), 1 if mode == "L" else 3, *size))
    broken |= _decode_all(folder, files, list(headers), pixels, mode, reading)
    if broken:
        raise _unusable(folder, files, broken)
    return Dataset(name, pixels, labels, class_names, tuple(files))


def find(folder: Path) -> list[str]:
    """The image files in a folder and its sub-folders: paths in it, with "/", sorted as text."""
    return sorted(path.relative_to(folder).as_posix() for path in _walk(folder, ()))


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # a link to a folder that it lies in
        return
    for entry in list(os.scandir(folder)):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(folder / entry.name, (*above, real))
        elif Path(entry.name).suffix.lower() in ENDINGS and (entry.is_file() or entry.is_symlink()):
            yield folder / entry.name  # a link to nothing as well: reading it tells


def class_labels(
    folder: Path, files: list[str], wanted: str
) -> tuple[Int64 | None, tuple[str, ...]]:
    """Labels (N,) and class names of images by the first folder on their path, sorted; or none."""
    stray = [file for file in files if "/" not in file]
    if wanted == "none" or (wanted == "auto" and len(stray) == len(files)):
        return None, ()
    if len(stray) == len(files):
        raise DataError(
            f"{folder} has no class folders, which --labels folders asks for: all {len(files)} "
            "images lie directly in it; make a folder for each class, or give --labels none"
        )
    if stray:
        raise DataError(
            f"{folder} has class folders and, outside of them, {len(stray)} images without a "
            f"class: {listed(stray)}; move them into class folders, or give --labels none"
        )
    of_file = [file.partition("/")[0] for file in files]
    names = sorted(set(of_file))
    refuse_one_class(str(folder), names)
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[name] for name in of_file], np.int64), tuple(names)


def _headers(
    folder: Path, files: list[str], reading: Reading
) -> tuple[dict[int, Header], dict[int, str]]:
    """What the files say, and why some cannot be used; both by index."""
    headers: dict[int, Header] = {}
    broken: dict[int, str] = {}
    part = (0.0, HEADERS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for i in counted(range(len(files)), len(files), "opened", reading.progress, part):
            answer = _header(folder / files[i], with_size=reading.size is None)
            if isinstance(answer, Header):
                headers[i] = answer
            else:
                broken[i] = answer
    return headers, broken


def _header(path: Path, with_size: bool) -> Header | str:
    """What the file says, or why it cannot be used."""
    try:
        return _open_header(path, with_size)
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged files
        return _reason(error)


def _open_header(path: Path, with_size: bool) -> Header:
    with Image.open(path, formats=FORMATS) as image:
        mode = image.mode
        if mode[0] in "IF" or any(DEEP.search(str(tile[3])) for tile in image.tile):
            raise DataError(f"16 or more bits a channel (mode {mode}); convert it to 8")
        if mode not in MODES:
            raise DataError(f"its mode is {mode}; convert it to RGB")
        if not with_size:
            return Header(mode in GRAY, None)
        if image.format == "TIFF":
            image.load()  # older versions of Pillow have its upright size only now
        width, height = image.size
        turned = _orientation(image) in (5, 6, 7, 8)
        return Header(mode in GRAY, (width, height) if turned else (height, width))


def _orientation(image: Image.Image) -> int:
    """EXIF's 1..8. The pixels of an image whose EXIF is broken may be fine: 1."""
    if image.format == "TIFF":
        return 1  # Pillow turns it itself as it loads it
    try:
        # Not image.getexif(): before a PNG is loaded that would decode it.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1


def _common_size(folder: Path, headers: dict[int, Header]) -> tuple[int, int]:
    """The one size (H, W) that all images have.

    Raises:
        DataError: they have several.
    """
    sizes = Counter(header.size for header in headers.values() if header.size is not None)
    ((size, _), *others) = sizes.most_common()
    if not others:
        return size
    shown = [f"{n} of {h}x{w}" for (h, w), n in sizes.most_common(SIZES_SHOWN)]
    rest = f", and {len(sizes) - SIZES_SHOWN} more sizes" if len(sizes) > SIZES_SHOWN else ""
    raise DataError(
        f"the images in {folder} must be of one size; they have {len(sizes)} (height x width): "
        f"{', '.join(shown)}{rest}; give --size 64 --fit crop|pad|resize"
    )


def _decode_all(
    folder: Path, files: list[str], chosen: list[int], pixels: UInt8, mode: str, reading: Reading
) -> dict[int, str]:
    """Decode the chosen files into `pixels` (N, C, H, W); why some cannot be, by index."""

    def decode(i: int) -> str | None:
        try:
            put(pixels[i], _decode(folder / files[i], mode, pixels.shape[2:], reading))
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            return _reason(error)
        return None

    pool = ThreadPoolExecutor(THREADS)
    try:
        answers = pool.map(decode, chosen)
        done = counted(answers, len(chosen), "image", reading.progress, (HEADERS, 1.0))
        return {i: why for i, why in zip(chosen, done, strict=True) if why is not None}
    finally:
        pool.shutdown(cancel_futures=True)  # at Ctrl-C do not decode all the others first


def _decode(path: Path, mode: str, size: tuple[int, ...], reading: Reading) -> Image.Image:
    height, width = size
    with Image.open(path, formats=FORMATS) as image:
        if reading.size is not None:  # a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size
            image.draft(None, (int(GAP * max(size)),) * 2)
        image.load()
        turn = TURNS.get(_orientation(image))
        upright = image if turn is None else image.transpose(turn)
        if reading.size is None and upright.size != (width, height):
            raise DataError(
                f"{upright.height}x{upright.width} when decoded, the others {height}x{width}; give "
                "--size"
            )
        return fitted(flat(upright, mode), (height, width), reading.fit)


def _reason(error: Exception) -> str:
    """Why a file cannot be used, in words."""
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"more than the {Image.MAX_IMAGE_PIXELS} pixels that Pillow trusts; shrink it"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image that Pillow reads ({', '.join(FORMATS)})"
    if isinstance(error, FileNotFoundError):
        return "a link to nothing, or just removed"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    return f"damaged: {error}" if str(error) else f"damaged: {type(error).__name__}"


def _unusable(folder: Path, files: list[str], broken: dict[int, str]) -> DataError:
    lines = [f"  {files[i]}: {broken[i]}" for i in sorted(broken)]
    return DataError(
        f"{len(broken)} of {len(files)} images in {folder} cannot be used; replace or remove "
        "them:\n" + "\n".join(lines)
    )
