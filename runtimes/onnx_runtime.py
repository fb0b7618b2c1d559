"""ONNX Runtime: the adapter that runs everywhere pip does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.errors import EngineError, RuntimeUnavailableError
from ddpm_edge.runtimes.base import TensorSpec, check_inputs

NAME = "onnxruntime"
REMEDY = "pip install 'ddpm-edge[cpu]', or 'ddpm-edge[gpu]' for an NVIDIA GPU"
DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(int64)": np.dtype(np.int64),
}


class OnnxRuntimeEngine:
    """An ONNX model in an ONNX Runtime session.

    Args:
        model: an .onnx file, or its bytes.
        device: "cpu", "cuda" or "cuda:N"; None = a GPU that really works, else the CPU.
        threads: CPU threads of one call; None = ONNX Runtime's choice, the physical cores.

    Raises:
        RuntimeUnavailableError: onnxruntime is not installed, or the device is not there.
        EngineError: the model cannot be loaded.
    """

    runtime = NAME
    concurrent = True  # InferenceSession.run may be called from several threads

    def __init__(
        self, model: str | Path | bytes, device: str | None = None, threads: int | None = None
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise RuntimeUnavailableError(
                f"onnxruntime cannot be imported ({error}); {REMEDY}"
            ) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: warnings would go to the app's stderr
        if threads is not None:
            options.intra_op_num_threads = threads
        provider, number = _provider(device, onnxruntime.get_available_providers())
        providers: list[Any] = ["CPUExecutionProvider"]
        if provider == "CUDAExecutionProvider":
            providers.insert(0, (provider, {"device_id": number, "use_tf32": 0}))
        try:
            source = model if isinstance(model, bytes) else str(model)
            session = onnxruntime.InferenceSession(source, options, providers=providers)
        except Exception as error:  # its exception classes have only Exception in common
            raise EngineError(f"ONNX Runtime cannot load the model: {error}") from error
        got = session.get_providers()[0]
        if device is not None and got != provider:
            raise RuntimeUnavailableError(
                f"device {device!r} was asked for, but ONNX Runtime runs on {got}: its GPU "
                "libraries or the driver did not load; check the CUDA version that this "
                "onnxruntime-gpu needs, or use device='cpu'"
            )
        self.device = f"cuda:{number}" if got == "CUDAExecutionProvider" else "cpu"
        self.inputs = {i.name: _spec(i) for i in session.get_inputs()}
        self.outputs = {o.name: _spec(o) for o in session.get_outputs()}
        self._session: Any = session

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the model (see `Engine`)."""
        session = self._session
        if session is None:
            raise EngineError("the engine is closed; open it again")
        check_inputs(self.inputs, arrays)
        names = list(self.outputs)
        return dict(zip(names, session.run(names, dict(arrays)), strict=True))

    def close(self) -> None:
        """Free the session; a call that is under way in another thread still finishes."""
        self._session = None

    def __enter__(self) -> OnnxRuntimeEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _provider(device: str | None, there: list[str]) -> tuple[str, int]:
    """The execution provider and the device number for a device's name."""
    kind, _, number = (device or "").partition(":")
    if device is None:
        cuda = "CUDAExecutionProvider" in there
        return ("CUDAExecutionProvider" if cuda else "CPUExecutionProvider"), 0
    if device == "cpu":
        return "CPUExecutionProvider", 0
    if kind == "cuda" and (number.isdecimal() or device == "cuda"):
        if "CUDAExecutionProvider" not in there:
            raise RuntimeUnavailableError(
                f"device {device!r} was asked for, but this onnxruntime has only "
                f"{', '.join(there)}; pip install 'ddpm-edge[gpu]' (not beside [cpu]), or use "
                "device='cpu'"
            )
        return "CUDAExecutionProvider", int(number or 0)
    raise RuntimeUnavailableError(
        f"ONNX Runtime has no device {device!r}; use 'cpu', 'cuda' or 'cuda:N'"
    )


def _spec(node: Any) -> TensorSpec:
    if node.type not in DTYPES:
        raise EngineError(
            f"the model's {node.name!r} is {node.type}; expected {' or '.join(DTYPES)}"
        )
    shape = tuple(size if isinstance(size, int) else None for size in node.shape)
    return TensorSpec(shape, DTYPES[node.type])
