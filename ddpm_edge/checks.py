"""Checks of what a caller gives: Python's or NumPy's numbers, but no bool and no text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.errors import ConfigError

MOST = 2**63 - 1  # what int64 holds


def whole(
    name: str,
    value: Any,
    least: int = 1,
    most: int = MOST,
    error: type[ConfigError] = ConfigError,
) -> int:
    """`value` as int, if it is a whole number in least..most."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise error(f"{name} must be a whole number >= {least}; got {shown(value)}")
    if value > most:
        raise error(f"{name} must be a whole number <= {most}; got {shown(value)}")
    return int(value)


def number(name: str, value: Any, error: type[ConfigError] = ConfigError) -> float:
    """`value` as float, if it is a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise error(f"{name} must be a number; got {shown(value)}")
    try:
        return float(value)
    except OverflowError as overflow:
        raise error(
            f"{name} must be a number that float64 can hold; got {shown(value)}"
        ) from overflow


def array(name: str, value: Any) -> Array:
    """`value` as an array of real numbers or bools, if it is one or a list of them."""
    try:
        got = np.asarray(value)
    except (ValueError, TypeError) as error:  # rows of several lengths
        raise ConfigError(f"{name} must be an array of numbers; {error}") from error
    if got.dtype.kind not in "biuf":
        raise ConfigError(
            f"{name} must be an array of numbers; got {shown(value)} ({type(value).__name__})"
        )
    return got


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """`value`, if it maps names to values."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name} must map names to values; got {shown(value)}")
    return value


def choice(name: str, value: Any, known: Iterable[str]) -> str:
    """`value`, if it is one of the known names."""
    names = list(known)
    if not isinstance(value, str) or value not in names:
        raise ConfigError(unknown(name, value, names))
    return value


def unknown(what: str, got: Any, known: Iterable[str]) -> str:
    """What to say of a name that is not one of the known ones: the nearest, and all of them."""
    import difflib  # what is slow to import is not, unless somebody mistypes

    names = list(known)
    near = difflib.get_close_matches(str(got)[:80], names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{what} must be one of {', '.join(names)}; got {shown(got)}{hint}"


def shown(value: Any) -> str:
    """What a caller gave, for a message: cut where it is long."""
    text = " ".join(repr(value).split())  # arrays have several lines
    return text if len(text) <= 80 else f"{text[:77]}..."


def flag(name: str, value: Any) -> bool:
    """`value`, if it is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ConfigError(f"{name} must be True or False; got {shown(value)}")
    return bool(value)
