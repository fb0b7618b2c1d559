"""OpenVINO: the adapter for CPUs that compute in bfloat16 or int8 where they can."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.errors import ClosedError, EngineError, RuntimeUnavailableError
from ddpm_edge.runtimes.base import TensorSpec, check_inputs

NAME = "openvino"
REMEDY = "pip install 'ddpm-edge[openvino]'"
DTYPES: dict[str, np.dtype[Any]] = {"f32": np.dtype(np.float32), "i64": np.dtype(np.int64)}
OUT_OF_MEMORY = (
    "bad_alloc", "bad allocation", "out of memory", "allocate", "Resource temporarily unavailable",
)  # fmt: skip
TELEMETRY = "openvino_telemetry"
POLL_MS = 100
_LOCK = threading.Lock()


class OpenVinoEngine:
    """An ONNX model compiled by OpenVINO for the CPU.

    The types in the file decide the precision: a float32 file is computed in float32. A file in
    bfloat16 gets the hint for it too, on a processor that computes in it: what lies between two
    tensors of bfloat16 is then evaluated with them, with fewer conversions, hence fewer roundings.

    Args:
        model: the bytes of an .onnx file.
        device: "cpu" or None.
        threads: CPU threads of one call; None = OpenVINO's choice, the physical cores.

    Raises:
        RuntimeUnavailableError: openvino is not installed, or the device is none of its.
        EngineError: the model cannot be loaded.
        MemoryError: too little memory for it.
    """

    runtime, device = NAME, "cpu"
    concurrent = False  # one stream: calls of several threads would wait for each other anyway
    max_batch = None

    def __init__(self, model: bytes, device: str | None = None, threads: int | None = None) -> None:
        if device not in (None, "cpu"):
            raise RuntimeUnavailableError(f"OpenVINO has no device {device!r} here; use 'cpu'")
        with _LOCK:
            self._core: Any = _core()
        self._model: bytes | None = model
        self._properties: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # or all processes of one thread share the first CPU
        }
        if threads is not None:
            self._properties["INFERENCE_NUM_THREADS"] = threads
        self._request: Any = self._compiled()
        ports = self._request.model_inputs, self._request.model_outputs
        self.inputs, self.outputs = ({_name(p): _spec(p) for p in side} for side in ports)

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the model (see `Engine`)."""
        if self._model is None:
            raise ClosedError("the engine was closed; open it again")
        check_inputs(self.inputs, arrays)
        request = self._request or self._compiled()
        # After a lack of memory the compiled model gives wrong answers, and so it does after
        # InferRequest.cancel (2026.4): what did not end well is compiled again.
        self._request = None
        try:
            _run(request, arrays)
        except BaseException as error:
            failure = _failure(request)
            if failure is not None and isinstance(error, Exception):
                raise failure from error
            raise  # what interrupted
        self._request = request
        return {name: np.array(request.get_tensor(name).data) for name in self.outputs}

    def close(self) -> None:
        """Free the compiled model (see `Engine`)."""
        self._model = self._request = None

    def __enter__(self) -> OpenVinoEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _compiled(self) -> Any:
        """A request of the model, compiled."""
        try:
            model = self._core.read_model(self._model)
            hint = {"INFERENCE_PRECISION_HINT": _precision(self._core, model)}
            compiled = self._core.compile_model(model, "CPU", self._properties | hint)
            return compiled.create_infer_request()
        except Exception as error:
            text = _words(error)
            if _lacks_memory(error):
                raise MemoryError(f"OpenVINO cannot load the model: {text}") from error
            raise EngineError(f"OpenVINO cannot load the model: {text}") from error


@functools.cache  # called under the lock: `cache` alone may call it twice
def _core() -> Any:
    """The one Core of this process, which is never freed.

    The CPU's plugin gives the thread that loads it a stack for signal handlers and takes it away
    when it goes, in whatever order or thread: after two Cores, or in another thread, the next
    signal would end the process (2026.4).
    """
    return _openvino().Core()


def _openvino() -> Any:
    """The module, imported without the part that reports to its makers and writes to ~/intel."""
    before = {TELEMETRY: sys.modules[TELEMETRY]} if TELEMETRY in sys.modules else {}
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # to import it is an ImportError
    try:
        import openvino
    except ImportError as error:
        raise RuntimeUnavailableError(f"openvino cannot be imported ({error}); {REMEDY}") from error
    finally:
        del sys.modules[TELEMETRY]
        sys.modules.update(before)
    return openvino


def _precision(core: Any, model: Any) -> str:
    """What the model is to be computed in."""
    types = {
        output.get_element_type().get_type_name()
        for op in model.get_ops()
        for output in op.outputs()
    }
    native = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bf16" if "bf16" in types and native else "f32"


def _run(request: Any, arrays: Mapping[str, Array]) -> None:
    """Run to the end; Python acts on Ctrl-C ten times a second meanwhile."""
    # `infer` raises nothing where memory lacks, and leaves the last answer in place
    try:
        request.start_async(dict(arrays))  # copies: the caller's arrays are free afterwards
    except Exception as error:  # RuntimeError, and whatever else it passes on
        raise _what_failed(error) from error
    while not request.wait_for(POLL_MS):
        pass


def _failure(request: Any) -> Exception | None:
    """Why a run failed, as an Engine promises it; None = it has not failed, and is ended now."""
    try:
        if request.wait_for(0):
            request.wait()
            return None
    except Exception as error:
        return _what_failed(error)
    request.cancel()
    with contextlib.suppress(Exception):  # that it was cancelled
        request.wait()
    return None


def _what_failed(error: Exception) -> Exception:
    """A failure of a run as the error that an Engine promises."""
    text = _words(error)
    if _lacks_memory(error):
        return MemoryError(f"OpenVINO: {text}")
    return EngineError(
        f"OpenVINO failed: {text}; verify the bundle, or try another variant or runtime"
    )


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY)


def _words(error: Exception) -> str:
    """What it says, without the places in its own source."""
    lines = str(error).strip().splitlines()
    return " ".join(line for line in lines if line and not line.startswith("Exception from "))


def _name(port: Any) -> str:
    """The name in the file: a tensor that the graph only hands on has several names here."""
    return str(port.node.friendly_name).partition("/sink_port")[0]


def _spec(port: Any) -> TensorSpec:
    kind = port.element_type.get_type_name()
    if kind not in DTYPES:
        raise EngineError(f"the model's {_name(port)!r} is {kind}; expected {' or '.join(DTYPES)}")
    shape = tuple(
        None if size.is_dynamic else size.get_length() for size in port.get_partial_shape()
    )
    return TensorSpec(shape, DTYPES[kind])
