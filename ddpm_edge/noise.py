"""Standard normal draws that depend on (seed, stream, sample, row) alone: noise version 1.

The same four numbers give the same values on every machine, in any batch and any order, so a
picture is known by its seed. The words come from Philox4x64-10 (Salmon et al. 2011), a
counter-based generator whose raw output NumPy keeps stable; `Generator.standard_normal` is not kept stable, so
the transform (Box and Muller 1958, in float64, rounded to float32) is ours.

    Philox key     (seed, stream)
    Philox counter (block, row, sample, 0), block = 0, 1, ... of four words each
    words          in pairs (u, v): radius sqrt(-2 ln u), angle 2 pi v -> radius cos, radius sin
"""

from __future__ import annotations

import secrets
from enum import IntEnum
from typing import Any

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.errors import ConfigError

VERSION = 1
MAX_SEED = 2**64 - 1
_TO_UNIT = 2.0**-53


class Stream(IntEnum):
    """What a draw is for; draws of different streams are independent."""

    START = 0
    STEP = 1


def standard_normal(seed: int, stream: Stream, sample: int, row: int, count: int) -> Array:
    """`count` standard normal draws, float32 (count,).

    Args:
        seed: 0..2**64 - 1.
        stream: what the draw is for.
        sample: index of the sample, >= 0.
        row: index of the plan's row, >= 0.
        count: how many; a shorter draw is the beginning of a longer one.
    """
    pairs = (count + 1) // 2
    key = np.array([seed, stream], np.uint64)
    counter = np.array([0, row, sample, 0], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(2 * pairs)
    unit = (words >> np.uint64(11)) * _TO_UNIT  # float64 in [0, 1), 53 bits
    radius = np.sqrt(-2.0 * np.log1p(-unit[0::2]))  # 1 - unit is in (0, 1]: never ln 0
    angle = (2.0 * np.pi) * unit[1::2]
    normal = np.empty((pairs, 2), np.float32)
    normal[:, 0] = radius * np.cos(angle)
    normal[:, 1] = radius * np.sin(angle)
    return normal.reshape(-1)[:count]


def fill(out: Array, seed: int, stream: Stream, first: int, row: int) -> None:
    """Overwrite out (B, ...) with the draws of samples first..first + B - 1."""
    for i, sample in enumerate(out):
        sample[...] = standard_normal(seed, stream, first + i, row, sample.size).reshape(
            sample.shape
        )


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
