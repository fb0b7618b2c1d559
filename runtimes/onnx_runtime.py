"""ONNX Runtime: the adapter that runs everywhere pip does."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_edge import processor
from ddpm_edge.arrays import Array
from ddpm_edge.errors import (
    ClosedError,
    DdpmEdgeError,
    EngineError,
    EngineLostError,
    RuntimeUnavailableError,
)
from ddpm_edge.runtimes import cuda
from ddpm_edge.runtimes.base import TensorSpec, check_inputs
from ddpm_edge.runtimes.interrupt import interruptibly, sees_interrupts

log = logging.getLogger("ddpm_edge")

# From 1.32 on it reports to its makers and writes to ~/.cache/Microsoft, unless it is told not to
# before it is imported. Who wants that sets 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

NAME = "onnxruntime"
REMEDY = "pip install 'ddpm-edge[cpu]', or 'ddpm-edge[gpu]' for an NVIDIA GPU"
DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(int64)": np.dtype(np.int64),
}
OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate memory", "out of memory")
LOST = (
    "illegal memory access", "unspecified launch failure", "device-side assert",
    "misaligned address", "illegal instruction", "uncorrectable ECC",
)  # fmt: skip
VNNI = {"avx512_vnni", "avx_vnni"}  # sums of int8 products in int32
CUDA = "CUDAExecutionProvider"
SLOW_SECONDS = 0.1  # a call that takes longer must itself be interruptible


class OnnxRuntimeEngine:
    """An ONNX model in an ONNX Runtime session.

    Args:
        model: an .onnx file, or its bytes.
        device: "cpu", "cuda" or "cuda:N"; None = a GPU that really works, else the CPU.
        threads: CPU threads of one call; None = ONNX Runtime's choice, the physical cores.
        optimize: whether ONNX Runtime may change the graph; without, every node is computed as it
            stands there.

    Raises:
        RuntimeUnavailableError: onnxruntime is not installed, or the device is not there.
        EngineError: the model cannot be loaded.
    """

    runtime = NAME
    max_batch = None
    gpu: cuda.GPU
    stream: int | None = None
    _session: Any = None

    def __init__(
        self,
        model: str | Path | bytes,
        device: str | None = None,
        threads: int | None = None,
        optimize: bool = True,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise RuntimeUnavailableError(
                f"onnxruntime cannot be imported ({error}); {REMEDY}"
            ) from error
        provider, number = _provider(device, onnxruntime.get_available_providers())
        source = model if isinstance(model, bytes) else str(model)
        session: Any = None
        if provider == CUDA:
            session = self._on_gpu(source, _session_options(threads, optimize), number)
        if session is None:
            options = _session_options(threads, optimize)
            chosen = [(provider, _cuda_options(number))] if provider == CUDA else []
            providers = [*chosen, "CPUExecutionProvider"]
            session = _open(source, options, providers, by_name=device is not None)
        got = session.get_providers()[0]
        if device is not None and got != provider:
            raise RuntimeUnavailableError(
                f"device {device!r} was asked for, but ONNX Runtime runs on {got}: its GPU "
                "libraries or the driver did not load; check the CUDA version that this "
                "onnxruntime-gpu needs, or use device='cpu'"
            )
        self.device = f"cuda:{number}" if got == CUDA else "cpu"
        # InferenceSession.run may be called from several threads, but for one stream's.
        self.concurrent = self.stream is None
        self.inputs = {i.name: _spec(i) for i in session.get_inputs()}
        self.outputs = {o.name: _spec(o) for o in session.get_outputs()}
        self._session, self._pid = session, os.getpid()
        self._bound = Bound(session, self.outputs, number) if self.device != "cpu" else None
        self._residents: weakref.WeakSet[OnDevice] = weakref.WeakSet()
        self._options = _run_options()
        self._seconds_a_sample = math.inf  # of the last call: nobody knows before the first

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the model (see `Engine`)."""
        session, bound = self._session, self._bound  # another thread may close the engine
        if session is None:
            raise ClosedError("the engine was closed; open it again")
        batch = check_inputs(self.inputs, arrays)
        names, feed = list(self.outputs), dict(arrays)
        slow = batch * self._seconds_a_sample > SLOW_SECONDS
        start = time.perf_counter()
        if bound is not None:  # on a GPU, whose evaluations are short
            answers = _explained(lambda: bound.run(feed, batch, self._options))
        elif slow and sees_interrupts():
            answers = _run_interruptibly(session, names, feed)
        else:
            answers = _explained(lambda: session.run(names, feed, self._options))
        self._seconds_a_sample = (time.perf_counter() - start) / batch
        return dict(zip(names, answers, strict=True))

    def resident(self, batch: int, addresses: Mapping[str, int]) -> OnDevice:
        """An evaluation that is not to be captured (see `GpuEngine`)."""
        self.check_open()
        binding = self._session.io_binding()
        kind, _, number = self.device.partition(":")
        for name, address in addresses.items():
            spec = (self.inputs | self.outputs)[name]
            shape = (batch, *(size or 1 for size in spec.shape[1:]))
            bind = binding.bind_input if name in self.inputs else binding.bind_output
            bind(name, kind, int(number or 0), spec.dtype.type, shape, address)
        resident = OnDevice(self, binding)
        self._residents.add(resident)
        return resident

    def check_open(self) -> None:
        """Raise ClosedError if it was closed."""
        if self._session is None:
            raise ClosedError("the engine was closed; open it again")

    def run_bound(self, binding: Any) -> None:
        """Evaluate what a binding holds."""
        self.check_open()
        session = self._session
        _explained(lambda: session.run_with_iobinding(binding, self._options))

    def close(self) -> None:
        """Free the session (see `Engine`)."""
        if self._session is None:
            return
        for resident in self._residents:  # a binding keeps the session, which needs the stream
            resident.binding = None
        self._session = self._bound = None
        if self.stream is not None:
            with contextlib.suppress(DdpmEdgeError):  # nothing can be freed on a lost GPU
                cuda.use(self.gpu)
                cuda.call("cudaStreamSynchronize", self.stream)  # what others have queued
                cuda.call("cudaStreamDestroy", self.stream)

    def __del__(self) -> None:
        if self._session is not None and self.stream is not None:
            cuda.collected(self.close, self._pid)

    def __enter__(self) -> OnnxRuntimeEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _on_gpu(self, source: str | bytes, options: Any, number: int) -> Any:
        """A session on a stream of ours; None = it cannot be.

        All of the model must be on the GPU: what the CPU needs of an input ONNX Runtime copies when
        it is bound, and would not see what is written there afterwards.
        """
        _load_cuda_libraries()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.log_severity_level = 4  # what fails is tried again without the stream
        stream = None
        try:
            self.gpu = cuda.gpu(f"cuda:{number}")
            stream = cuda.new_stream(self.gpu)
            own = _cuda_options(number) | {"user_compute_stream": str(stream)}
            session = _open(source, options, [(CUDA, own)], by_name=True)
        except (DdpmEdgeError, MemoryError) as error:
            log.info("ONNX Runtime's arrays do not stay on the GPU: %s", error)
            if stream is not None:
                cuda.call("cudaStreamDestroy", stream)
            return None
        self.stream = stream
        return session


class OnDevice:
    """An evaluation whose arrays stay on the GPU (see `Resident`).

    No CUDA graph holds it. ONNX Runtime cannot be part of a capture of ours
    (microsoft/onnxruntime#32081). Its own graphs, before 1.30, replay copies of small arrays
    (Concat's, of channels that differ) from memory of the host that it has used again since, which
    gives wrong answers (#32121). From then on they are right, but a session that may capture keeps,
    until it is closed, a graph and cuBLAS's and cuDNN's handles for every thread that ever ran it:
    an app with a thread for each request would run out of memory. So each evaluation is launched
    kernel by kernel, and waits for the end, as ONNX Runtime frees such memory only then.
    """

    capturable = False

    def __init__(self, engine: OnnxRuntimeEngine, binding: Any) -> None:
        self._engine, self.binding = engine, binding

    def __call__(self) -> None:
        """Evaluate it."""
        self._engine.run_bound(self.binding)


class Bound:
    """Inputs and outputs that stay on the device, so that nothing is allocated there per call.

    Each thread has its own. They are made anew where the batch changes.

    Args:
        session: what runs.
        outputs: what it gives, every dimension but the batch known.
        number: of the device.
        device: ONNX Runtime's word for the kind of device.
    """

    def __init__(
        self, session: Any, outputs: Mapping[str, TensorSpec], number: int, device: str = "cuda"
    ) -> None:
        self._session, self._outputs = session, outputs
        self._device, self._number = device, number
        self._own = threading.local()

    def run(self, arrays: Mapping[str, Array], batch: int, options: Any) -> list[Array]:
        """`session.run`, the outputs in order."""
        own = self._own
        if getattr(own, "batch", None) != batch:
            own.batch = None
            own.binding, own.inputs, own.outputs = self._bind(arrays, batch)
            own.batch = batch
        for name, array in arrays.items():
            own.inputs[name].update_inplace(np.ascontiguousarray(array))
            # again: what the CPU needs of it is copied at this moment, not when the model runs
            own.binding.bind_ortvalue_input(name, own.inputs[name])
        self._session.run_with_iobinding(own.binding, options)
        return [np.array(own.outputs[name].numpy()) for name in self._outputs]

    def _bind(self, arrays: Mapping[str, Array], batch: int) -> tuple[Any, Any, Any]:
        from onnxruntime import OrtValue

        binding = self._session.io_binding()
        inputs, outputs = {}, {}
        for name, array in arrays.items():
            inputs[name] = OrtValue.ortvalue_from_numpy(
                np.ascontiguousarray(array), self._device, self._number
            )
        for name, spec in self._outputs.items():
            shape = [batch, *(size or 1 for size in spec.shape[1:])]
            outputs[name] = OrtValue.ortvalue_from_shape_and_type(
                shape, spec.dtype.type, self._device, self._number
            )
            binding.bind_ortvalue_output(name, outputs[name])
        return binding, inputs, outputs


def _session_options(threads: int | None, optimize: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: warnings would go to the app's stderr
    if not processor.instructions() & VNNI:  # int8: the right sums, not those that overflow
        options.add_session_config_entry("session.x64quantprecision", "1")
    # Its threads would spin on after a call, and take the app's CPUs or another runtime's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _cuda_options(number: int) -> dict[str, str]:
    return {"device_id": str(number), "use_tf32": "0"}


def _load_cuda_libraries() -> None:
    """Let ONNX Runtime find CUDA's libraries where pip put them; it prints what it lacks."""
    import onnxruntime

    preload = getattr(onnxruntime, "preload_dlls", None)  # from 1.21 on
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            preload()


def _open(source: str | bytes, options: Any, providers: list[Any], by_name: bool) -> Any:
    """A session; one that was not asked for by name falls back to the CPU, and logs it."""
    import onnxruntime

    try:  # without its own fall back, which prints to stdout
        return onnxruntime.InferenceSession(source, options, providers=providers, enable_fallback=0)
    except Exception as error:  # its exception classes have only Exception in common
        if len(providers) > 1 and not by_name:
            log.warning("ONNX Runtime cannot use the GPU (%s); it takes the CPU", error)
            return _open(source, options, providers[1:], by_name)
        remedy = ""
        if "NOT_IMPLEMENTED" in str(error):  # bf16 on a CPU, above all
            remedy = "; it cannot run this precision here: take another --variant or --runtime"
        raise EngineError(f"ONNX Runtime cannot load the model: {error}{remedy}") from error


def _run_options() -> Any:
    """Options of a run whose errors are raised and not also written to the app's stderr."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.log_severity_level = 4  # fatal only
    return options


def _run_interruptibly(session: Any, names: list[str], feed: dict[str, Array]) -> Any:
    """`session.run`, ended between two of the model's operators by what interrupts this thread."""
    options = _run_options()

    def terminate() -> None:
        options.terminate = True

    return interruptibly(lambda: _explained(lambda: session.run(names, feed, options)), terminate)


def _explained(run: Callable[[], Any]) -> Any:
    """The result of a run, whose failure is raised as an Engine promises."""
    try:
        return run()
    except Exception as error:  # its exception classes have only Exception in common
        raise _what_failed(error) from error


def _what_failed(error: Exception) -> Exception:
    """A failure of `session.run` as the error that an Engine promises."""
    text = str(error).strip()
    if any(sign in text for sign in LOST):
        return EngineLostError(
            f"the GPU is lost to this process (ONNX Runtime: {text}); restart the process"
        )
    if isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY):
        return MemoryError(f"ONNX Runtime: {text}")
    return EngineError(
        f"ONNX Runtime failed: {text}; verify the bundle, or try another variant or device"
    )


def _provider(device: str | None, there: list[str]) -> tuple[str, int]:
    """The execution provider and the device number for a device's name."""
    kind, _, number = (device or "").partition(":")
    if device is None:
        return (CUDA if CUDA in there else "CPUExecutionProvider"), 0
    if device == "cpu":
        return "CPUExecutionProvider", 0
    if kind == "cuda" and (number.isdecimal() or device == "cuda"):
        if CUDA not in there:
            raise RuntimeUnavailableError(
                f"device {device!r} was asked for, but this onnxruntime has only "
                f"{', '.join(there)}; pip install 'ddpm-edge[gpu]' (not beside [cpu]), or use "
                "device='cpu'"
            )
        return CUDA, int(number or 0)
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
