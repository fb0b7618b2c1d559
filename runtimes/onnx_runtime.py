"""ONNX Runtime: the adapter that runs everywhere pip does."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.errors import ClosedError, EngineError, RuntimeUnavailableError
from ddpm_edge.runtimes.base import TensorSpec, check_inputs

log = logging.getLogger("ddpm_edge")

NAME = "onnxruntime"
REMEDY = "pip install 'ddpm-edge[cpu]', or 'ddpm-edge[gpu]' for an NVIDIA GPU"
DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(int64)": np.dtype(np.int64),
}
OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate memory", "out of memory")
SLOW_SECONDS = 0.1  # a call that takes longer must itself be interruptible
POLL_SECONDS = 0.1  # on Windows a wait for another thread does not see Ctrl-C before its end


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
        source = model if isinstance(model, bytes) else str(model)
        session = _open(source, options, providers, by_name=device is not None)
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
        self._options = _run_options()
        self._seconds_a_sample = math.inf  # of the last call: nobody knows before the first

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the model (see `Engine`)."""
        session = self._session
        if session is None:
            raise ClosedError("the engine was closed; open it again")
        batch = check_inputs(self.inputs, arrays)
        names, feed = list(self.outputs), dict(arrays)
        slow = batch * self._seconds_a_sample > SLOW_SECONDS
        start = time.perf_counter()
        try:
            if slow and _sees_interrupts():
                answers = _run_interruptibly(session, names, feed)
            else:
                answers = session.run(names, feed, self._options)
        except Exception as error:  # its exception classes have only Exception in common
            raise _what_failed(error) from error
        self._seconds_a_sample = (time.perf_counter() - start) / batch
        return dict(zip(names, answers, strict=True))

    def close(self) -> None:
        """Free the session (see `Engine`)."""
        self._session = None

    def __enter__(self) -> OnnxRuntimeEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _open(source: str | bytes, options: Any, providers: list[Any], by_name: bool) -> Any:
    """A session; one that was not asked for by name falls back to the CPU, and logs it."""
    import onnxruntime

    try:  # without its own fall back, which prints to stdout
        return onnxruntime.InferenceSession(source, options, providers=providers, enable_fallback=0)
    except Exception as error:  # its exception classes have only Exception in common
        if len(providers) > 1 and not by_name:
            log.warning("ONNX Runtime cannot use the GPU (%s); it takes the CPU", error)
            return _open(source, options, providers[1:], by_name)
        raise EngineError(f"ONNX Runtime cannot load the model: {error}") from error


def _run_options() -> Any:
    """Options of a run whose errors are raised and not also written to the app's stderr."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.log_severity_level = 4  # fatal only
    return options


def _sees_interrupts() -> bool:
    """Whether this is the main thread, and the program is not yet ending (no new threads then)."""
    me = threading.current_thread()
    return me is threading.main_thread() and me.is_alive()


def _run_interruptibly(session: Any, names: list[str], feed: dict[str, Array]) -> Any:
    """`session.run`, ended early by whatever interrupts the main thread, which calls this.

    Python acts on Ctrl-C, or on any signal that the app handles, only between two instructions of
    the main thread. So another thread runs the session, for this one call, while the main thread
    waits. ONNX Runtime ends a run between two of the model's operators. The hand-off costs a few
    tenths of a millisecond: not for a model that is done in milliseconds.
    """
    options = _run_options()
    with futures.ThreadPoolExecutor(1) as helper:  # leaving it waits for the end of the run
        try:
            run = helper.submit(session.run, names, feed, options)
            while not futures.wait([run], timeout=POLL_SECONDS).done:
                pass
        except BaseException:
            options.terminate = True
            raise
    return run.result()


def _what_failed(error: Exception) -> Exception:
    """A failure of `session.run` as the error that an Engine promises."""
    text = str(error).strip()
    if isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY):
        return MemoryError(f"ONNX Runtime: {text}")
    return EngineError(
        f"ONNX Runtime failed: {text}; verify the bundle, or try another variant or device"
    )


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
