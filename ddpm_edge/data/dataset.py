"""Images in memory for training: choosing some, holding some out, and proving which they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ddpm_edge.arrays import Array, Int64, UInt8
from ddpm_edge.checks import number, whole
from ddpm_edge.errors import ConfigError, DataError


@dataclass(frozen=True)
class Dataset:
    """Images for training.

    Attributes:
        name: where they came from.
        images: uint8 (N, C, H, W).
        labels: int64 (N,) in 0..classes-1, or None.
        class_names: one name a label, or empty.
        files: one name an image: its path inside the folder that was read, with "/" between the
            parts. Empty where the images are numbered 0..N-1.
    """

    name: str
    images: UInt8
    labels: Int64 | None = None
    class_names: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def names(self) -> tuple[str, ...]:
        """One name an image: `files`, or the numbers 0..N-1 as text."""
        return self.files or tuple(str(i) for i in range(len(self.images)))

    def subset(self, index: Array | list[int]) -> Dataset:
        """The images that `index` chooses, int (n,) or bool (N,), as a copy.

        They keep the names that they have here, so that a subset of numbered images can be found
        again by `select`. The classes stay the same, also those that no image is left of.

        Raises:
            IndexError: a number that no image has.
        """
        index = np.arange(len(self.images))[index]
        names = self.names
        return Dataset(
            name=self.name,
            images=self.images[index],
            labels=None if self.labels is None else self.labels[index],
            class_names=self.class_names,
            files=tuple(names[i] for i in index),
        )

    def sha256(self) -> str:
        """Hex digest of the shape, the pixels, the labels and the class names; not of file names.

        The same on every machine for the same pixels. Decoders of JPEG and resampling may differ
        in a pixel's last bit from one version of Pillow to another, and then so does the digest.
        """
        head = {
            "shape": list(self.images.shape),
            "labels": self.labels is not None,
            "class_names": list(self.class_names),
        }
        digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode() + b"\n")
        digest.update(np.ascontiguousarray(self.images).reshape(-1).data)
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def split(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Hold about `share` of the images out: the rest for training, then those held out.

    An image is held out if SHA-256 of "seed/name", read as a fraction in [0, 1), is below `share`.
    So this depends on the seed and the image's own name alone: adding or removing files moves no
    other image to the other side, a larger share holds out the same images and more, and no random
    generator's version matters. The price is that the share is met on average only: of N images
    N * share are held out, give or take sqrt(N * share * (1 - share)).

    Args:
        data: what to divide; the order stays.
        share: to hold out, in (0, 1).
        seed: of the draw, >= 0.

    Raises:
        ConfigError: a share outside (0, 1), a bad seed, or nothing falls on one of the two sides.
    """
    share, seed = number("share", share), whole("seed", seed, least=0)
    if not 0 < share < 1:
        raise ConfigError(f"the share to hold out (--val) must be in (0, 1); got {share}")
    out = np.array([_fraction(seed, name) < share for name in data.names], bool)
    if out.all() or not out.any():
        side = "training" if out.all() else "held-out"
        raise ConfigError(
            f"a share of {share} and seed {seed} leave no {side} image of {len(out)}; give another "
            "share (--val) or seed (--seed), or more images"
        )
    return data.subset(~out), data.subset(out)


def _fraction(seed: int, name: str) -> float:
    text = f"{seed}/{name}".encode("utf-8", "surrogateescape")  # file names may be any bytes
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big") / 2**48  # exact in float64


def mixed(data: Dataset) -> Dataset:
    """The images in an order that has nothing to do with theirs: the same for the same data."""
    return data.subset(sorted(range(len(data.images)), key=lambda i: _fraction(0, str(i))))


def select(data: Dataset, names: Iterable[str]) -> Dataset:
    """The images called `names`, in that order: those that were held out, to judge by.

    Raises:
        DataError: some are not in the data; they are listed.
    """
    names = list(names)
    index = {name: i for i, name in enumerate(data.names)}
    missing = [name for name in names if name not in index]
    if missing:
        raise DataError(
            f"{data.name} lacks {len(missing)} of {len(names)} images that are asked for: "
            f"{listed(missing)}; give the data that they were taken from"
        )
    return data.subset(np.array([index[name] for name in names], np.int64))


def listed(names: list[str], most: int = 20) -> str:
    """The names for an error message, at most `most` of them."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
