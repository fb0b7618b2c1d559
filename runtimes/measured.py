"""Figures that were measured on this machine, remembered until the machine or a runtime changes.

    FILE      {SHA-256 of a model: {KEY: {"machine", and the figures}}}

Nothing but choices depends on them: a file that is gone or was damaged costs a new measurement.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ddpm_edge import processor
from ddpm_edge.files import write_bytes

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx")

log = logging.getLogger("ddpm_edge")


class Measured:
    """One such file, in the device's cache."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def note(self, model: str, key: str, figures: Mapping[str, Any]) -> None:
        """Remember figures of a model; `key` tells those of one model apart.

        Raises:
            OSError: they cannot be written.
        """
        records = self._records()
        if not isinstance(records.get(model), dict):  # not as this function writes it
            records[model] = {}
        records[model][key] = {**figures, "machine": machine()}
        self.file.parent.mkdir(0o700, parents=True, exist_ok=True)
        self._write(records)

    def find(self, model: str, key: str) -> dict[str, Any]:
        """The figures, if they were measured on this machine as it is now; else nothing."""
        try:
            record = self._records()[model][key]
            now = record["machine"] == machine()
        except (KeyError, TypeError):  # never measured, or damaged
            return {}
        if not now:
            log.info("this machine or a runtime has changed since %s was written", self.file)
            return {}
        return dict(record)

    def drop(self, model: str) -> None:
        """Forget the figures of a model.

        Raises:
            OSError: the file cannot be written.
        """
        records = self._records()
        if records.pop(model, None) is not None:
            self._write(records)

    def listed(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """All of it, whether still valid or not: SHA-256 of the model, key, figures."""
        for model, records in self._records().items():
            if isinstance(records, dict):
                yield from ((model, k, r) for k, r in records.items() if isinstance(r, dict))

    def forget(self) -> None:
        """Remove all of it."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.file)

    def _write(self, records: Mapping[str, Any]) -> None:
        write_bytes(self.file, (json.dumps(records, indent=1) + "\n").encode(), mode=0o644)

    def _records(self) -> dict[str, Any]:
        """The file's content; nothing where there is none, or none that can be read."""
        try:
            found = json.loads(self.file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            log.info("%s is not used: %s", self.file, error)
            return {}
        return found if isinstance(found, dict) else {}


def machine() -> dict[str, Any]:
    """What a measurement depends on: processor, CPUs of this process, power mode, runtimes."""
    return {
        "processor": processor.name(),
        "cpus": processor.cpus(),
        "power_mode": processor.power_mode(),
        "versions": dict(_versions()),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)
