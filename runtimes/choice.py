"""The fastest runtime of a model on this machine, as it was measured and remembered.

It only orders the runtimes that `auto` tries: one that is gone costs nothing but the choice.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path

from ddpm_edge.runtimes.measured import Measured

FILE = "fastest.json"


def remember(
    directory: Path, model: bytes, device: str | None, ms_a_step: Mapping[str, float]
) -> str:
    """Note the fastest runtime of a model; its name.

    Args:
        directory: the device's cache.
        model: the .onnx file.
        device: as `open_engine` was asked for it.
        ms_a_step: what each runtime took, milliseconds; at least one.

    Raises:
        OSError: it cannot be written there.
    """
    figures = {"ms_a_step": dict(ms_a_step)}
    Measured(directory / FILE).note(_digest(model), device or "any", figures)
    return _fastest(ms_a_step)


def remembered(directory: Path, model: bytes, device: str | None) -> dict[str, float]:
    """What each runtime took, if it was measured on this machine as it is now; else nothing."""
    measured = Measured(directory / FILE)
    if not measured.file.exists():  # nothing is hashed in vain
        return {}
    record = measured.find(_digest(model), device or "any")
    try:
        return {str(name): float(ms) for name, ms in record["ms_a_step"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):  # nothing, or damaged
        return {}


def listed(directory: Path) -> list[tuple[str, str, str]]:
    """All that is remembered, whether still valid or not: SHA-256 of the model, device, runtime."""
    found = []
    for model, device, record in Measured(directory / FILE).listed():
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):  # damaged
            found.append((model, device, _fastest(record["ms_a_step"])))
    return found


def forget(directory: Path) -> None:
    """Remove all that was remembered."""
    Measured(directory / FILE).forget()


def _fastest(ms_a_step: Mapping[str, float]) -> str:
    return min(ms_a_step, key=lambda name: ms_a_step[name])


def _digest(model: bytes) -> str:
    return hashlib.sha256(model).hexdigest()
