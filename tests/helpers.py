"""What several test files use: a network in one line of NumPy, and a way to edit a bundle.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ddpm_edge import bundle
from ddpm_edge.runtimes import TensorSpec
from ddpm_edge.runtimes.base import check_inputs


class ToyEngine:
    """prediction = tanh(x + t / 1000 + label / 10): an Engine in one line of NumPy."""

    runtime, device, concurrent = "toy", "cpu", True

    def __init__(self, sample_shape: tuple[int, ...] = (1, 28, 28), labelled: bool = True) -> None:
        image = TensorSpec((None, *sample_shape), np.dtype(np.float32))
        number = TensorSpec((None,), np.dtype(np.int64))
        self.inputs = {"x": image, "t": number} | ({"label": number} if labelled else {})
        self.outputs = {"prediction": image}
        self.calls: list[dict[str, np.ndarray]] = []
        self.closed = False

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        check_inputs(self.inputs, arrays)
        self.calls.append({name: array.copy() for name, array in arrays.items()})
        shift = arrays["t"] / 1000 + arrays.get("label", np.zeros(1)) / 10
        shift = shift.astype(np.float32)[:, None, None, None]
        return {"prediction": np.tanh(arrays["x"] + shift)}

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> ToyEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def rewrite(path: Path, remove: str = "", **changes: object) -> None:
    """Change fields of a bundle.json so that its digest fits again."""
    document = json.loads((path / bundle.MANIFEST).read_text()) | changes
    document.pop(remove, None)
    document["digest"] = bundle._digest(document)
    (path / bundle.MANIFEST).write_text(json.dumps(document))
