"""TensorRT, of either flavour: runs an engine that was built on this device.

Host arrays go through pinned memory to the GPU and back, on a stream of the engine's own. Neither
torch nor PyCUDA is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.errors import (
    ClosedError,
    EngineError,
    EngineLostError,
    EngineMissingError,
    OutOfMemoryError,
)
from ddpm_edge.runtimes import cuda
from ddpm_edge.runtimes.base import TensorSpec, check_inputs
from ddpm_edge.runtimes.cuda import GPU
from ddpm_edge.runtimes.engine_cache import EngineCache, EngineKey, cache_directory
from ddpm_edge.runtimes.flavour import Flavour, flavour_for

log = logging.getLogger("ddpm_edge")

NAME = "tensorrt"
OUT_OF_MEMORY = re.compile(r"out ?of ?memory|not be allocated|alloc\w* fail", re.IGNORECASE)
NON_BLOCKING = 1  # cudaStreamNonBlocking: does not wait for the legacy default stream


def open_built(
    model: bytes, variant: str, device: str | None, cache_dir: str | Path | None
) -> TensorRTEngine:
    """Open the newest engine of an ONNX file that was built on this device.

    Raises:
        RuntimeUnavailableError: no GPU that works, or no TensorRT.
        EngineMissingError: no engine of this model, GPU and TensorRT that loads; with the reason.
    """
    gpu = cuda.gpu(device)  # before TensorRT is touched
    flavour = flavour_for(gpu)
    key = engine_key(model, variant, flavour, gpu)
    engine, entry = EngineCache(cache_directory(cache_dir)).find(key)
    try:
        return TensorRTEngine(engine, flavour, gpu)
    except EngineError as error:
        raise EngineMissingError(f"{entry} does not load: {error}") from error


def engine_key(
    model: bytes,
    variant: str,
    flavour: Flavour,
    gpu: GPU,
    profile: tuple[int, int, int] = (0, 0, 0),
    flags: Mapping[str, int] | None = None,
) -> EngineKey:
    """All that an engine depends on; whoever only looks for one knows no profile and flags."""
    return EngineKey(
        model=hashlib.sha256(model).hexdigest(),
        variant=variant,
        flavour=flavour.name,
        version=flavour.version,
        device=f"{gpu.name}, {gpu.multiprocessors} SMs",  # all Orins have one name
        compute_capability=gpu.compute_capability,
        profile=profile,
        flags=dict(flags or {}),
    )


class TensorRTEngine:
    """A serialized TensorRT engine on a GPU.

    Args:
        engine: its bytes, trusted: an engine is native code. It runs only with the version of
            TensorRT and on the kind of GPU it was built for.
        flavour: what runs it.
        gpu: where.

    Raises:
        EngineError: it is not an engine for this TensorRT and this GPU.
        OutOfMemoryError: too little memory on the GPU.
    """

    runtime: str
    concurrent = False  # one execution context, one set of buffers

    def __init__(self, engine: bytes, flavour: Flavour, gpu: GPU) -> None:
        trt = flavour.trt
        self.runtime, self.device = flavour.name, gpu.device
        self._gpu, self._buffers = gpu, Buffers()
        self._context: Any = None
        self._lost: EngineLostError | None = None
        self._logger = collecting_logger(trt, warnings=logging.WARNING)
        cuda.call("cudaSetDevice", gpu.number)
        self._stream: Any = None
        self._runtime: Any = trt.Runtime(self._logger)
        self._engine: Any = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:  # it does not raise
            said = self._logger.said()
            if OUT_OF_MEMORY.search(said):
                raise _no_memory(flavour, gpu, said)
            raise EngineError(f"{flavour} on {gpu} refuses the engine: {said}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise _no_memory(flavour, gpu, self._logger.said())
        self.inputs, self.outputs = _specs(trt, self._engine)
        shapes = self._engine.get_tensor_profile_shape(next(iter(self.inputs)), 0)
        self.min_batch, _, self.max_batch = (int(shape[0]) for shape in shapes)
        self._stream = cuda.call("cudaStreamCreateWithFlags", NON_BLOCKING)

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the model (see `Engine`).

        Raises:
            EngineLostError: the GPU is lost to this process.
        """
        if self._lost is not None:
            raise self._lost
        if self._context is None:
            raise ClosedError("the engine was closed; open it again")
        batch = check_inputs(self.inputs, arrays)
        if not self.min_batch <= batch <= self.max_batch:
            raise EngineError(
                f"the engine was built for batches of {self.min_batch} to {self.max_batch}; got "
                f"{batch} (guidance asks the network twice at once): give a smaller batch=, or "
                f"ddpm-edge build with --max-batch {batch}"
            )
        try:
            return self._run(arrays, batch)
        except EngineLostError as error:
            self._lost = error
            raise

    def _run(self, arrays: Mapping[str, Array], batch: int) -> dict[str, Array]:
        cuda.call("cudaSetDevice", self._gpu.number)  # of this thread
        answers = {}
        for name, array in arrays.items():
            shape = (batch, *array.shape[1:])
            device, host = self._buffers.of(name, shape, array.dtype)
            np.copyto(host, array)
            _copy(device, host.ctypes.data, host.nbytes, "cudaMemcpyHostToDevice", self._stream)
            self._bind(name, device, shape)
        for name, spec in self.outputs.items():
            shape = (batch, *(size or 1 for size in spec.shape[1:]))
            device, answers[name] = self._buffers.of(name, shape, spec.dtype)
            self._bind(name, device, None)
        if not self._context.execute_async_v3(int(self._stream)):
            raise EngineError(f"TensorRT failed: {self._logger.said()}")
        for name, host in answers.items():
            device = self._buffers.device(name)
            _copy(host.ctypes.data, device, host.nbytes, "cudaMemcpyDeviceToHost", self._stream)
        cuda.call("cudaStreamSynchronize", self._stream)
        return {name: host.copy() for name, host in answers.items()}

    def _bind(self, name: str, address: int, shape: tuple[int, ...] | None) -> None:
        """Tell the context where a tensor is, and how large an input is."""
        context = self._context
        sized = shape is None or context.set_input_shape(name, shape)
        if not sized or not context.set_tensor_address(name, address):
            raise EngineError(f"TensorRT does not take {name!r} {shape}: {self._logger.said()}")

    def close(self) -> None:
        """Free the engine and its memory (see `Engine`)."""
        if self._context is None:
            return
        self._context = self._engine = self._runtime = None  # in this order
        with contextlib.suppress(EngineLostError):  # nothing can be freed on a lost GPU
            if self._lost is None:
                cuda.call("cudaSetDevice", self._gpu.number)
                self._buffers.free()
                cuda.call("cudaStreamDestroy", self._stream)

    def __enter__(self) -> TensorRTEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _no_memory(flavour: Flavour, gpu: GPU, said: str) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"{flavour} on {gpu} has no memory to run the engine: {said}; end what else uses the GPU, "
        "or build with a smaller --max-batch"
    )


class Buffers:
    """Memory of each tensor, on the GPU and pinned on the host; grows with the batch."""

    def __init__(self) -> None:
        self._memory: dict[str, tuple[int, int, int]] = {}  # name: GPU, host, bytes

    def of(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, Array]:
        """Address on the GPU, and the array on the host, of a tensor of this shape."""
        size = int(np.prod(shape)) * dtype.itemsize
        if self._memory.get(name, (0, 0, -1))[2] < size:
            self._free(name)
            device = int(cuda.call("cudaMalloc", size))
            try:
                host = int(cuda.call("cudaMallocHost", size))
            except BaseException:
                cuda.call("cudaFree", device)
                raise
            self._memory[name] = device, host, size
        device, host, _ = self._memory[name]
        memory = (ctypes.c_byte * size).from_address(host)
        return device, np.frombuffer(memoryview(memory), dtype).reshape(shape)

    def device(self, name: str) -> int:
        """The address on the GPU."""
        return self._memory[name][0]

    def free(self) -> None:
        """Free all of it."""
        for name in list(self._memory):
            self._free(name)

    def _free(self, name: str) -> None:
        if name in self._memory:
            device, host, _ = self._memory.pop(name)
            cuda.call("cudaFree", device)
            cuda.call("cudaFreeHost", host)


def _copy(to: int, source: int, size: int, direction: str, stream: Any) -> None:
    kind = getattr(cuda.cudart().cudaMemcpyKind, direction)
    cuda.call("cudaMemcpyAsync", to, source, size, kind, stream)


def _specs(trt: Any, engine: Any) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """The inputs and the outputs of an engine."""
    dtypes = {trt.DataType.FLOAT: np.float32, trt.DataType.INT64: np.int64}
    inputs: dict[str, TensorSpec] = {}
    outputs: dict[str, TensorSpec] = {}
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        dtype = engine.get_tensor_dtype(name)
        if dtype not in dtypes:
            raise EngineError(f"the engine's {name!r} is {dtype}; expected float32 or int64")
        shape = tuple(None if size < 0 else int(size) for size in engine.get_tensor_shape(name))
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        (inputs if is_input else outputs)[name] = TensorSpec(shape, np.dtype(dtypes[dtype]))
    return inputs, outputs


def collecting_logger(trt: Any, warnings: int = logging.INFO) -> Any:
    """A logger of TensorRT that passes its words on to `ddpm_edge` and keeps what went wrong.

    Args:
        trt: the module.
        warnings: level at which its warnings are logged. Builders warn a lot.
    """
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.Severity.ERROR: logging.ERROR,
        trt.ILogger.Severity.WARNING: warnings,
        trt.ILogger.Severity.INFO: logging.DEBUG,
        trt.ILogger.Severity.VERBOSE: logging.NOTSET,
    }

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:  # raised by whoever called, so not logged as well
                self.errors.append(msg.strip())
            elif level:
                log.log(level, "TensorRT: %s", msg.strip())

        def said(self) -> str:
            """The errors since the last time, the first ones."""
            said, self.errors = self.errors[:3], []
            return "; ".join(said) or "it does not say why"

    return Logger()
