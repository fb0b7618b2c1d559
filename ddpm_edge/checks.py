"""Checks of what a caller gives: Python's or NumPy's numbers, but no bool and no text."""

from __future__ import annotations

from typing import Any

import numpy as np

from ddpm_edge.errors import ConfigError


def whole(name: str, value: Any, least: int = 1, error: type[ConfigError] = ConfigError) -> int:
    """`value` as int, if it is a whole number >= least."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise error(f"{name} must be a whole number >= {least}; got {value!r}")
    return int(value)


def number(name: str, value: Any, error: type[ConfigError] = ConfigError) -> float:
    """`value` as float, if it is a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise error(f"{name} must be a number; got {value!r}")
    return float(value)
