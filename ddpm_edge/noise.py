"""Standard normal draws that depend on (seed, stream, sample, row) alone: noise version 1.

The same four numbers give the same values on every machine, in any batch and any order, so a
picture is known by its seed. The words come from Philox4x64-10 (Salmon et al. 2011), a
counter-based generator whose raw output NumPy keeps stable. NumPy's own normal draws are not kept
stable, so the transform (Box and Muller 1958, in float64, rounded to float32) is ours.

    Philox key     (seed, stream)
    Philox counter (block, row, sample, 0), block = 1, 2, ... of four words each
    words          in pairs (u, v): radius sqrt(-2 ln u), angle 2 pi v -> radius cos, radius sin
"""

from __future__ import annotations

import math
import secrets
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np

from ddpm_edge.arrays import Float32, Float64, UInt64
from ddpm_edge.errors import ConfigError

VERSION = 1
MAX_SEED = 2**64 - 1
BLOCK = 16_384  # draws made at once, of several rows or part of one: what the caches hold; even
_TO_UNIT = 2.0**-53


class Stream(IntEnum):
    """What a draw is for; draws of different streams are independent."""

    START = 0
    STEP = 1
    TRAVEL = 2
    LANGEVIN = 3
    LIKELIHOOD = 4


def standard_normal(seed: int, stream: Stream, sample: int, row: int, count: int) -> Float32:
    """`count` standard normal draws, float32 (count,).

    Args:
        seed: 0..2**64 - 1.
        stream: what the draw is for.
        sample: index of the sample, >= 0.
        row: index of the plan's row, >= 0.
        count: how many; a shorter draw is the beginning of a longer one.
    """
    draws: Float32 = Draws(seed, sample, (1, count)).rows(stream, range(row, row + 1))[0, 0]
    return draws


def words(seed: int, stream: Stream, sample: int, row: int, count: int) -> UInt64:
    """`count` uniform words of 64 bits; arguments as of `standard_normal`."""
    return Draws(seed, sample, (1, count))._words(stream, sample, row, count)[:count]


def to_unit(words: UInt64) -> Float64:
    """Uniform words as uniform numbers in [0, 1), float64 of 53 bits."""
    unit: Float64 = (words >> np.uint64(11)) * _TO_UNIT
    return unit


class Draws:
    """The draws of consecutive samples: `draws(stream, row)` is float32 (B, ...).

    Several rows are made at a time. Between two evaluations of a network nothing of ours is in the
    processor's caches, and starting again costs more than the draws themselves.

    Args:
        seed: 0..2**64 - 1.
        first: index of the first sample.
        shape: (B, ...).
    """

    def __init__(self, seed: int, first: int, shape: tuple[int, ...]) -> None:
        self.seed, self.first, self.shape = seed, first, shape
        self.ahead = max(1, BLOCK // max(1, math.prod(shape)))
        self._blocks: dict[Stream, dict[int, Float32]] = {}

    @cached_property
    def _philox(self) -> np.random.Philox:
        return np.random.Philox(key=0)

    def __call__(self, stream: Stream, row: int) -> Float32:
        """The draws for one row of a plan."""
        block = self._blocks.get(stream, {})
        if row not in block:
            rows = range(row, row + self.ahead)
            block = self._blocks[stream] = dict(zip(rows, self.rows(stream, rows), strict=True))
        return block[row]

    def prior(self) -> Float32:
        """What the samples start from; float32 (B, ...)."""
        draws: Float32 = self.rows(Stream.START, range(1))[0]
        return draws

    def rows(self, stream: Stream, rows: range) -> Float32:
        """The draws for several rows; float32 (len(rows), B, ...)."""
        batch, count = self.shape[0], math.prod(self.shape[1:])
        # allocated before anything is drawn, so that too many samples fail at once
        normal = np.empty((len(rows) * batch, count + count % 2), np.float32)
        drawn = [(row, sample) for row in rows for sample in range(self.first, self.first + batch)]
        at_once = max(1, BLOCK // max(1, count))
        for part in (slice(i, i + at_once) for i in range(0, len(drawn), at_once)):
            words = [self._words(stream, sample, row, count) for row, sample in drawn[part]]
            _to_normal(np.concatenate(words), out=normal[part].reshape(-1))
        return normal[:, :count].reshape(len(rows), *self.shape)

    def _words(self, stream: Stream, sample: int, row: int, count: int) -> UInt64:
        """The raw words for `count` draws: a whole number of pairs."""
        self._philox.state = {  # six times quicker than a new Philox
            "bit_generator": "Philox",
            "state": {
                "key": np.array([self.seed, stream], np.uint64),
                "counter": np.array([0, row, sample, 0], np.uint64),
            },
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,  # nothing left in the buffer
            "has_uint32": 0,
            "uinteger": 0,
        }
        words: UInt64 = self._philox.random_raw(count + count % 2)
        return words


def _to_normal(words: UInt64, out: Float32) -> None:
    """Pairs of words as pairs of normals; both (2 n,)."""
    for piece in (slice(i, i + BLOCK) for i in range(0, len(words), BLOCK)):
        unit = to_unit(words[piece])
        radius = np.sqrt(-2.0 * np.log1p(-unit[0::2]))  # 1 - unit is in (0, 1]: never ln 0
        angle = (2.0 * np.pi) * unit[1::2]
        np.multiply(radius, np.cos(angle), out=out[piece][0::2], casting="same_kind")
        np.multiply(radius, np.sin(angle), out=out[piece][1::2], casting="same_kind")


def check_seed(seed: Any) -> int:
    """A seed as int; None draws a fresh one (below 2**53, so that any JSON reader keeps it).

    Raises:
        ConfigError: not a whole number in 0..2**64 - 1; bool and float are refused.
    """
    if seed is None:
        return secrets.randbits(53)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise ConfigError(
            f"seed must be a whole number in 0..2**64 - 1 or None; got {seed!r} "
            f"({type(seed).__name__})"
        )
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed must be in 0..2**64 - 1; got {seed}")
    return int(seed)
