"""OpenVINO: the adapter for x86 and Arm CPUs, also in bfloat16 where the CPU has it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.errors import ClosedError, EngineError, RuntimeUnavailableError
from ddpm_edge.runtimes.base import TensorSpec, check_inputs

NAME = "openvino"
REMEDY = "pip install 'ddpm-edge[openvino]'"
# What may be computed in less than float32 is what passed its gate so. Few CPUs compute in fp16:
# with its weights they compute in float32.
PRECISIONS = {"bf16": "bf16"}
DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "i64": np.dtype(np.int64),
}
OUT_OF_MEMORY = ("bad_alloc", "bad allocation", "out of memory", "could not allocate")


class OpenVinoEngine:
    """An ONNX model compiled by OpenVINO for the CPU.

    Args:
        model: the bytes of an .onnx file.
        variant: its precision: "bf16" allows bfloat16, anything else asks for float32.
        device: "cpu" or None.
        threads: CPU threads of one call; None = OpenVINO's choice.

    Raises:
        RuntimeUnavailableError: openvino is not installed, or the device is none of its.
        EngineError: the model cannot be loaded.
    """

    runtime, device = NAME, "cpu"
    concurrent = True  # every thread has a request of its own
    max_batch = None

    def __init__(
        self,
        model: bytes,
        variant: str = "fp32",
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        if device not in (None, "cpu"):
            raise RuntimeUnavailableError(f"OpenVINO has no device {device!r} here; use 'cpu'")
        try:
            import openvino
        except ImportError as error:
            raise RuntimeUnavailableError(
                f"openvino cannot be imported ({error}); {REMEDY}"
            ) from error
        properties: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": PRECISIONS.get(variant, "f32"),
        }
        if threads is not None:
            properties["INFERENCE_NUM_THREADS"] = threads
        core = openvino.Core()
        try:
            compiled = core.compile_model(core.read_model(model), "CPU", properties)
        except Exception as error:  # RuntimeError, and whatever else it passes on
            raise EngineError(f"OpenVINO cannot load the model: {_words(error)}") from error
        self.inputs = {port.any_name: _spec(port) for port in compiled.inputs}
        self.outputs = {port.any_name: _spec(port) for port in compiled.outputs}
        self._compiled: Any = compiled
        self._own = threading.local()

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the model (see `Engine`)."""
        compiled, own = self._compiled, self._own
        if compiled is None:
            raise ClosedError("the engine was closed; open it again")
        check_inputs(self.inputs, arrays)
        if getattr(own, "request", None) is None:
            own.request = compiled.create_infer_request()
        request = own.request
        # Arrays are shared, not copied: contiguous ones that outlive the run.
        feed = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        try:  # not ended early: after InferRequest.cancel every answer is empty (2026.4)
            request.infer(feed, share_inputs=True)
        except Exception as error:
            own.request = None
            raise _what_failed(error) from error
        return {name: np.array(request.get_tensor(name).data) for name in self.outputs}

    def close(self) -> None:
        """Free the compiled model (see `Engine`)."""
        self._compiled, self._own = None, threading.local()

    def __enter__(self) -> OpenVinoEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _what_failed(error: Exception) -> Exception:
    """A failure of a run as the error that an Engine promises."""
    text = _words(error)
    if isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY):
        return MemoryError(f"OpenVINO: {text}")
    return EngineError(
        f"OpenVINO failed: {text}; verify the bundle, or try another variant or runtime"
    )


def _words(error: Exception) -> str:
    """What it says, without the places in its own source."""
    lines = str(error).strip().splitlines()
    return " ".join(line for line in lines if line and not line.startswith("Exception from "))


def _spec(port: Any) -> TensorSpec:
    kind = port.element_type.get_type_name()
    if kind not in DTYPES:
        raise EngineError(
            f"the model's {port.any_name!r} is {kind}; expected {' or '.join(DTYPES)}"
        )
    shape = tuple(
        None if size.is_dynamic else size.get_length() for size in port.get_partial_shape()
    )
    return TensorSpec(shape, DTYPES[kind])
