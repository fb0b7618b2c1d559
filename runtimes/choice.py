"""The fastest runtime of a model on this machine, as it was measured and remembered.

    DIRECTORY/fastest.json     {SHA-256 of the model: {DEVICE: {"ms_a_step", "machine"}}}

It only orders the runtimes that `auto` tries: one that is gone, or a file that was damaged, costs
nothing but the choice.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ddpm_edge import processor
from ddpm_edge.files import write_bytes

FILE = "fastest.json"
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx")

log = logging.getLogger("ddpm_edge")


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
    records, digest = _records(directory), _digest(model)
    if not isinstance(records.get(digest), dict):  # not as this function writes it
        records[digest] = {}
    records[digest][device or "any"] = {
        "ms_a_step": dict(ms_a_step),
        "machine": machine(),
    }
    directory.mkdir(0o700, parents=True, exist_ok=True)
    write_bytes(directory / FILE, (json.dumps(records, indent=1) + "\n").encode(), mode=0o644)
    return _fastest(ms_a_step)


def remembered(directory: Path, model: bytes, device: str | None) -> dict[str, float]:
    """What each runtime took, if it was measured on this machine as it is now; else nothing."""
    records = _records(directory)
    try:
        record = records[_digest(model)][device or "any"] if records else None
        if record is None:
            return {}
        if record["machine"] == machine():
            return {str(name): float(ms) for name, ms in record["ms_a_step"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):  # another model or device, or damaged
        return {}
    log.info("this machine or a runtime has changed since `ddpm-edge bench --choose`")
    return {}


def listed(directory: Path) -> list[tuple[str, str, str]]:
    """All that is remembered, whether still valid or not: SHA-256 of the model, device, runtime."""
    found = []
    for model, devices in _records(directory).items():
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):  # damaged
            found += [(model, d, _fastest(r["ms_a_step"])) for d, r in devices.items()]
    return found


def _fastest(ms_a_step: Mapping[str, float]) -> str:
    return min(ms_a_step, key=lambda name: ms_a_step[name])


def forget(directory: Path) -> None:
    """Remove all that was remembered."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(directory / FILE)


def machine() -> dict[str, Any]:
    """What the measurement depends on: processor, CPUs of this process, versions of runtimes."""
    return {
        "processor": processor.name(),
        "cpus": processor.cpus(),
        "versions": dict(_versions()),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)


def _records(directory: Path) -> dict[str, Any]:
    """The file's content; nothing where there is none, or none that can be read."""
    try:
        found = json.loads((directory / FILE).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.info("%s is not used: %s", directory / FILE, error)
        return {}
    return found if isinstance(found, dict) else {}


def _digest(model: bytes) -> str:
    return hashlib.sha256(model).hexdigest()
