"""TensorRT, of either flavour: runs an engine that was built on this device.

Host arrays go through pinned memory to the GPU and back, on a stream of the engine's own. Neither
torch nor PyCUDA is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
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
from ddpm_edge.runtimes.cuda import GPU, Buffers, Memory
from ddpm_edge.runtimes.engine_cache import EngineCache, EngineKey, cache_directory
from ddpm_edge.runtimes.flavour import Flavour, flavour_for

log = logging.getLogger("ddpm_edge")

NAME = "tensorrt"
OUT_OF_MEMORY = re.compile(r"out ?of ?memory|not be allocated|alloc\w* fail", re.IGNORECASE)


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
    concurrent = False  # one stream, one memory for activations, one set of buffers
    _context: Any = None

    def __init__(self, engine: bytes, flavour: Flavour, gpu: GPU) -> None:
        trt = flavour.trt
        self.runtime, self.device, self.gpu = flavour.name, gpu.device, gpu
        self._pid = os.getpid()
        self._flavour, self._buffers = flavour, Buffers()
        self._lost: EngineLostError | None = None
        self._logger = collecting_logger(trt, warnings=logging.WARNING)
        cuda.use(gpu)
        self._runtime: Any = trt.Runtime(self._logger)
        self._engine: Any = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:  # it does not raise
            said = self._logger.said()
            if OUT_OF_MEMORY.search(said):
                raise _no_memory(flavour, gpu, said)
            raise EngineError(f"{flavour} on {gpu} refuses the engine: {said}")
        try:
            self._scratch = Memory(max(1, int(self._engine.device_memory_size_v2)))
        except MemoryError as error:
            raise _no_memory(flavour, gpu, str(error)) from error
        self._settings, self._compiled = _settings_of_contexts(trt, self._engine)
        try:
            self._context = self._new_context()
            self.inputs, self.outputs = _specs(trt, self._engine)
            shapes = self._engine.get_tensor_profile_shape(next(iter(self.inputs)), 0)
            self.min_batch, _, self.max_batch = (int(shape[0]) for shape in shapes)
            self.stream: int = cuda.new_stream(gpu)
        except BaseException:
            self._context = None
            self._scratch.free()
            raise

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the model (see `Engine`).

        Raises:
            EngineLostError: the GPU is lost to this process.
        """
        batch = check_inputs(self.inputs, arrays)
        self._check(batch)
        try:
            return self._run(arrays, batch)
        except EngineLostError as error:
            self._lost = error
            raise

    def resident(self, batch: int, addresses: Mapping[str, int]) -> Enqueued:
        """An evaluation in a context of its own (see `GpuEngine`): a graph takes a whole one."""
        self._check(batch)
        cuda.use(self.gpu)
        context = self._new_context()
        for name, address in addresses.items():
            shape = (batch, *self.inputs[name].shape[1:]) if name in self.inputs else None
            self._bind(context, name, address, shape)
        return Enqueued(self, context)

    def _new_context(self) -> Any:
        """A context; one stream runs all of them in turn, so that they share their memory."""
        context = self._engine.create_execution_context(self._settings)
        if context is None:
            raise _no_memory(self._flavour, self.gpu, self._logger.said())
        context.set_device_memory(self._scratch.address, self._scratch.size)
        return context

    def check_open(self) -> None:
        """Raise unless it can evaluate anything."""
        if self._lost is not None:
            raise self._lost
        if self._context is None:
            raise ClosedError("the engine was closed; open it again")

    def _check(self, batch: int) -> None:
        """Raise unless it can evaluate a batch of this size."""
        self.check_open()
        if not self.min_batch <= batch <= self.max_batch:
            raise EngineError(
                f"the engine was built for batches of {self.min_batch} to {self.max_batch}; got "
                f"{batch} (guidance asks the network twice at once): give a smaller batch=, or "
                f"ddpm-edge build with --max-batch {batch}"
            )

    def _run(self, arrays: Mapping[str, Array], batch: int) -> dict[str, Array]:
        cuda.use(self.gpu)
        for name, array in arrays.items():
            memory = self._buffers.of(name, array.nbytes, self.gpu.integrated)
            memory.write(array, self.stream)
            self._bind(self._context, name, memory.address, (batch, *array.shape[1:]))
        answers = {}
        for name, spec in self.outputs.items():
            shape = (batch, *(size or 1 for size in spec.shape[1:]))
            size = int(np.prod(shape)) * spec.dtype.itemsize
            answers[name] = self._buffers.of(name, size, self.gpu.integrated), shape, spec.dtype
            self._bind(self._context, name, answers[name][0].address, None)
        self.enqueue(self._context)
        hosts = {
            name: memory.read(shape, dtype, self.stream)
            for name, (memory, shape, dtype) in answers.items()
        }
        cuda.call("cudaStreamSynchronize", self.stream)
        return {name: host.copy() for name, host in hosts.items()}

    def enqueue(self, context: Any) -> None:
        """Queue an evaluation by a context of this engine."""
        if not context.execute_async_v3(self.stream):
            raise EngineError(f"TensorRT failed: {self._logger.said()}")

    def _bind(self, context: Any, name: str, address: int, shape: tuple[Any, ...] | None) -> None:
        """Tell a context where a tensor is, and how large an input is."""
        sized = shape is None or context.set_input_shape(name, shape)
        if not sized or not context.set_tensor_address(name, address):
            raise EngineError(f"TensorRT does not take {name!r} {shape}: {self._logger.said()}")

    def close(self) -> None:
        """Free the engine and its memory (see `Engine`)."""
        if self._context is None:
            return
        with contextlib.suppress(EngineLostError):  # on a lost GPU nothing can be waited for
            if self._lost is None:
                cuda.use(self.gpu)
                cuda.call("cudaStreamSynchronize", self.stream)  # what is still queued
        self._context = self._engine = self._runtime = None  # in this order
        with contextlib.suppress(EngineLostError):  # nor freed
            if self._lost is None:
                self._buffers.free()
                self._scratch.free()
                cuda.call("cudaStreamDestroy", self.stream)

    def __del__(self) -> None:
        cuda.collected(self.close, self._pid)

    def __enter__(self) -> TensorRTEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _settings_of_contexts(trt: Any, engine: Any) -> tuple[Any, Any]:
    """What contexts without memory of their own are made with, and what must outlive them.

    TensorRT for RTX would begin with slower kernels and compile those for the batch in the
    background: a graph that was captured meanwhile would keep the slow ones. So it compiles before
    the first call; what it has compiled, other contexts find in a cache.
    """
    by_caller = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    strategies = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    new_settings = getattr(engine, "create_runtime_config", None)
    if strategies is None or new_settings is None:
        return by_caller, None
    settings = new_settings()
    settings.set_execution_context_allocation_strategy(by_caller)
    settings.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    compiled = settings.create_runtime_cache()
    settings.set_runtime_cache(compiled)
    return settings, compiled


def _no_memory(flavour: Flavour, gpu: GPU, said: str) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"{flavour} on {gpu} has no memory to run the engine: {said}; end what else uses the GPU, "
        "or build with a smaller --max-batch"
    )


class Enqueued:
    """An evaluation whose arrays stay on the GPU (see `Resident`)."""

    def __init__(self, engine: TensorRTEngine, context: Any) -> None:
        self._context, self._engine = context, engine  # freed in this order
        asked = getattr(context, "is_stream_capturable", None)  # TensorRT for RTX knows
        self.capturable = asked is None or bool(asked(engine.stream))

    def __call__(self) -> None:
        """Queue it."""
        self._engine.check_open()
        self._engine.enqueue(self._context)


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
