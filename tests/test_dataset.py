"""Choosing images, holding some out, and the digest."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from ddpm_edge.data import Dataset, select, split
from ddpm_edge.errors import ConfigError, DataError

IMAGES = np.arange(6 * 1 * 2 * 2, dtype=np.uint8).reshape(6, 1, 2, 2)
LABELS = np.array([0, 1, 2, 0, 1, 2])
FILES = ("a/0.png", "a/1.png", "b/0.png", "b/1.png", "c/0.png", "c/ü.png")
PLAIN = Dataset("plain", IMAGES)
FULL = Dataset("full", IMAGES, LABELS, ("a", "b", "c"), FILES)

GOLDEN_0 = ("10", "16", "26", "28", "31", "34", "35", "38", "39")
GOLDEN_1 = ("0", "1", "3", "7", "11", "17", "18", "20", "37")
GOLDEN_FULL = ("a/0.png", "a/1.png", "b/1.png")
GOLDEN_FULL_DIGEST = "cabe306e645fcec23fb29d473dd488c1a4ddff680e3e79e98e3595eae03c9073"
GOLDEN_PLAIN_DIGEST = "a488e7fff9fb7f427be785d4b2aaf014a782da7802cc6fa7fa3d8f9cf362b214"


def numbered(count: int) -> Dataset:
    return Dataset("many", np.arange(count, dtype=np.uint8)[:, None, None, None])


def test_names() -> None:
    assert PLAIN.names == ("0", "1", "2", "3", "4", "5")
    assert FULL.names == FILES


@pytest.mark.parametrize("index", [[4, 1], np.array([4, 1]), [-2, 1]])
def test_subset(index: list[int]) -> None:
    part = FULL.subset(index)
    assert (part.images == IMAGES[[4, 1]]).all()
    assert part.labels is not None
    assert part.labels.tolist() == [1, 1]
    assert (part.name, part.class_names) == ("full", ("a", "b", "c"))
    assert part.files == ("c/0.png", "a/1.png")
    part.images[:] = 0
    assert IMAGES[4].any()  # a copy


def test_subset_of_numbered_images_keeps_their_numbers() -> None:
    part = PLAIN.subset(np.array([False, True, False, False, True, True]))
    assert part.names == ("1", "4", "5")
    assert part.subset([2]).names == ("5",)
    with pytest.raises(IndexError):
        part.subset([3])


def test_select() -> None:
    part = select(FULL, ["c/ü.png", "a/0.png"])
    assert (part.images == IMAGES[[5, 0]]).all()
    assert part.files == ("c/ü.png", "a/0.png")
    held_out = split(numbered(50), 0.3, seed=1)[1]
    again = select(numbered(50), held_out.names)
    assert (again.images == held_out.images).all()
    assert again.names == held_out.names


def test_select_lists_what_is_missing() -> None:
    message = "full lacks 2 of 3 images that are asked for: x.png, y.png; give the data that"
    with pytest.raises(DataError, match=message):
        select(FULL, iter(["x.png", "a/0.png", "y.png"]))
    with pytest.raises(DataError, match=r"29, 30, 31 and 980 more; give"):
        select(numbered(12), [str(i) for i in range(12, 1012)])


def test_split_golden() -> None:
    """The same images on every machine and for ever: runs on disk name them."""
    assert split(numbered(40), 0.2, seed=0)[1].names == GOLDEN_0
    assert split(numbered(40), 0.2, seed=1)[1].names == GOLDEN_1
    assert split(FULL, 0.5, seed=0)[1].names == GOLDEN_FULL


def test_split_by_the_words_of_its_docstring() -> None:
    """SHA-256 of "seed/name" as a fraction: its first hex digit below 8 is "below a half"."""
    first = [hashlib.sha256(f"5/{i}".encode()).hexdigest()[0] for i in range(200)]
    expected = tuple(str(i) for i in range(200) if first[i] in "01234567")
    assert split(numbered(200), 0.5, seed=5)[1].names == expected


def test_split_is_disjoint_and_complete() -> None:
    data = numbered(200)
    training, held_out = split(data, 0.25, seed=3)
    assert sorted({*training.names, *held_out.names}, key=int) == list(data.names)
    assert len(training.images) + len(held_out.images) == 200
    for part in (training, held_out):
        assert [str(v) for v in part.images.ravel()] == list(part.names)


def test_split_moves_no_image_when_others_come_or_the_order_changes() -> None:
    files = tuple(f"{i}.png" for i in range(300))
    images = np.zeros((300, 1, 1, 1), np.uint8)
    _, all_out = split(Dataset("d", images, files=files), 0.2, seed=0)
    _, few_out = split(Dataset("d", images[:100], files=files[199:99:-1]), 0.2, seed=0)
    assert set(few_out.files) == set(all_out.files) & set(files[100:200])
    _, more_out = split(Dataset("d", images, files=files), 0.3, seed=0)
    assert set(all_out.files) < set(more_out.files)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_split_meets_the_share(share: float) -> None:
    """Within 4 standard deviations of N * share; seeds are fixed, so this never flickers."""
    data = Dataset("many", np.zeros((20_000, 1, 1, 1), np.uint8))
    for seed in range(3):
        out = len(split(data, share, seed)[1].images)
        assert abs(out - 20_000 * share) <= 4 * (20_000 * share * (1 - share)) ** 0.5


def test_split_takes_file_names_that_are_not_text() -> None:
    files = ("a\udcff.png", "b.png", "c.png")  # as os.fsdecode gives the byte 0xff
    parts = split(Dataset("d", np.zeros((3, 1, 1, 1), np.uint8), files=files), 0.5, seed=0)
    assert {name for part in parts for name in part.names} == set(files)


@pytest.mark.parametrize(
    ("share", "seed", "message"),
    [
        (0, 0, r"the share to hold out \(--val\) must be in \(0, 1\); got 0.0"),
        (1.0, 0, r"must be in \(0, 1\); got 1.0"),
        (-0.1, 0, "got -0.1"),
        (float("nan"), 0, "got nan"),
        ("0.1", 0, "share must be a number; got '0.1'"),
        (0.1, -1, "seed must be a whole number >= 0; got -1"),
        (0.1, 0.5, "seed must be a whole number"),
        (1e-9, 0, r"a share of 1e-09 and seed 0 leave no held-out image of 6; give another share"),
        (1 - 1e-9, 0, "leave no training image of 6; give another share"),
    ],
)
def test_split_refuses(share: float, seed: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(FULL, share, seed)


def test_digest_golden() -> None:
    """By hand: the head as JSON and a line's end, the pixels, the labels as little-endian int64."""
    head = b'{"class_names": ["a", "b", "c"], "labels": true, "shape": [6, 1, 2, 2]}\n'
    labels = b"".join(int(i).to_bytes(8, "little") for i in LABELS)
    assert FULL.sha256() == hashlib.sha256(head + bytes(range(24)) + labels).hexdigest()
    assert FULL.sha256() == GOLDEN_FULL_DIGEST
    assert PLAIN.sha256() == GOLDEN_PLAIN_DIGEST


def test_digest_is_of_the_content() -> None:
    changed = IMAGES.copy()
    changed[3, 0, 1, 1] ^= 1
    others = [
        Dataset("full", changed, LABELS, ("a", "b", "c")),
        Dataset("full", IMAGES.reshape(6, 1, 4, 1), LABELS, ("a", "b", "c")),
        Dataset("full", IMAGES, LABELS[::-1].copy(), ("a", "b", "c")),
        Dataset("full", IMAGES, LABELS, ("a", "b", "d")),
        FULL.subset([0, 1, 2, 3, 5, 4]),
        PLAIN,
    ]
    assert len({FULL.sha256(), *(other.sha256() for other in others)}) == len(others) + 1
    same = np.asfortranarray(IMAGES)
    assert Dataset("x", same, LABELS.astype(np.int32), ("a", "b", "c")).sha256() == FULL.sha256()
