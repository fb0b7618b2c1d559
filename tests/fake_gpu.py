"""A GPU of NumPy arrays behind CUDA's and TensorRT's own interfaces: fakes at that boundary only.

What is copied or run on a stream happens when the stream is synchronised, in order, and memory
holds NaN until it is written: whoever forgets to copy, to bind or to wait reads rubbish. An
"engine" is an ONNX file with a header; ONNX Runtime computes it.
"""

# ruff: noqa: N802, N815  (the names are NVIDIA's)

from __future__ import annotations

import ctypes
import enum
import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import step_on_cpu
from helpers import ToyEngine

from ddpm_edge.errors import ClosedError
from ddpm_edge.runtimes.cuda import gpu, new_stream
from ddpm_edge.runtimes.onnx_runtime import OnnxRuntimeEngine


class CudaError(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorDevicesUnavailable = 46
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchFailure = 719
    cudaErrorInvalidValue = 1
    cudaErrorUnsupportedPtxVersion = 222
    cudaErrorStreamCaptureUnsupported = 900


class FakeCuda(ModuleType):
    """`cuda.bindings.runtime` and `.driver`. `fail[function] = error`: it fails from then on.

    Calls of the class itself go past that, and past the record of `calls`.
    """

    cudaError_t = CudaError
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, names: tuple[str, ...] = ("Orin",), memory: int = 1 << 33) -> None:
        super().__init__("cuda.bindings.runtime")
        self.names, self.memory, self.multiprocessors = names, memory, 16
        self.integrated = 1
        self.fail: dict[str, CudaError] = {}
        self.blocks: dict[str, dict[int, Any]] = {"device": {}, "host": {}}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.captured: dict[int, list[Callable[[], None]]] = {}  # by stream
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.events: dict[int, tuple[int, int] | None] = {}  # the stream, how much of it before
        self.modules: set[int] = set()
        self.done: dict[int, int] = {}  # by stream, how much of all its work
        self.numbers = itertools.count(1000)
        self.calls: list[str] = []
        self.working = threading.RLock()
        self.chosen: dict[int, int] = {}  # GPUs by the threads that have chosen one

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not re.match("cu(da)?[A-Z]", name) or not callable(value) or isinstance(value, type):
            return value

        def called(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name in self.fail:
                return (self.fail[name], None)
            with self.working:
                result = value(*arguments)
            if isinstance(result, CudaError):
                return (result, None)
            return (CudaError.cudaSuccess, result)

        return called

    def cudaGetDeviceCount(self) -> Any:
        return len(self.names) or CudaError.cudaErrorNoDevice

    def cudaGetDeviceProperties(self, number: int) -> Any:
        return SimpleNamespace(
            name=self.names[number].encode(), major=8, minor=7, totalGlobalMem=self.memory,
            integrated=self.integrated, multiProcessorCount=self.multiprocessors,
        )  # fmt: skip

    def cudaSetDevice(self, number: int) -> Any:
        self.chosen[threading.get_ident()] = number
        return None if number < len(self.names) else CudaError.cudaErrorInvalidValue

    def cudaGetDevice(self) -> Any:
        return self.chosen.get(threading.get_ident(), 0)

    def cudaGetErrorString(self, error: CudaError) -> Any:
        return b"words of the driver"

    def cudaMalloc(self, size: int) -> Any:
        return self._allocate("device", size)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        assert flags == 2
        return self._allocate("host", size)

    def cudaHostGetDevicePointer(self, address: int, flags: int) -> Any:
        assert (address in self.blocks["host"], flags) == (True, 0)
        return address

    def cudaFree(self, address: int) -> Any:
        self.wait()
        del self.blocks["device"][address]

    def cudaFreeHost(self, address: int) -> Any:
        self.wait()
        del self.blocks["host"][address]

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        assert flags == 1
        stream = next(self.numbers)
        self.streams[stream], self.done[stream] = [], 0
        return stream

    def cudaStreamDestroy(self, stream: int) -> Any:
        assert not self.streams.pop(stream)

    def cudaStreamSynchronize(self, stream: int) -> Any:
        if stream in self.captured:
            return CudaError.cudaErrorStreamCaptureUnsupported
        return self.work(stream, len(self.streams[stream]))

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> Any:
        there, here = ("device", "host") if kind == 1 else ("host", "device")
        self.check(there, to, size)
        self.check(here, source, size)
        self.queue(stream, lambda: ctypes.memmove(to, source, size) and None)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> Any:
        self.check("device", address, size)
        self.queue(stream, lambda: ctypes.memset(address, value, size) and None)

    # Events

    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        self.has_chosen()
        assert flags == 3
        event = next(self.numbers)
        self.events[event] = None
        return event

    def cudaEventRecord(self, event: int, stream: int) -> Any:
        self.events[event] = stream, self.done[stream] + len(self.streams[stream])

    def cudaEventSynchronize(self, event: int) -> Any:
        recorded = self.events[event]
        assert recorded is not None
        stream, before = recorded
        assert event in self.events
        if stream in self.streams:  # a stream is destroyed when its work is done
            self.work(stream, before - self.done[stream])

    def cudaEventDestroy(self, event: int) -> Any:
        del self.events[event]

    # Graphs

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:
        assert (mode, stream in self.captured) == (1, False)
        self.captured[stream] = []

    def cudaStreamEndCapture(self, stream: int) -> Any:
        if stream not in self.captured:
            return CudaError.cudaErrorInvalidValue
        graph = next(self.numbers)
        self.graphs[graph] = self.captured.pop(stream)
        return graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:
        executable = next(self.numbers)
        self.graphs[executable] = self.graphs[graph]
        return executable

    def cudaGraphLaunch(self, executable: int, stream: int) -> Any:
        assert stream not in self.captured
        for job in self.graphs[executable]:
            self.queue(stream, job)

    def cudaGraphDestroy(self, graph: int) -> Any:
        del self.graphs[graph]

    def cudaGraphExecDestroy(self, executable: int) -> Any:
        del self.graphs[executable]  # CUDA keeps it until it has run

    # Kernels

    def cuModuleLoadData(self, image: bytes) -> Any:
        self.has_chosen()
        assert b".entry begin(" in image[:-1] == image.rstrip(b"\0")
        self.modules.add(module := next(self.numbers))
        return module

    def cuModuleGetFunction(self, module: int, name: bytes) -> Any:
        assert module in self.modules
        return (b"begin", b"advance").index(name)

    def cuModuleUnload(self, module: int) -> Any:
        self.has_chosen()
        self.modules.remove(module)

    def cuLaunchKernel(self, kernel: int, *arguments: int) -> Any:
        blocks, y, z, threads, ty, tz, shared, stream, pointers, extra = arguments
        assert (y, z, ty, tz, shared, extra) == (1, 1, 1, 1, 0, 0)
        run = ctypes.c_void_p.from_address(ctypes.c_void_p.from_address(pointers).value or 0).value
        self.queue(stream, lambda: step_on_cpu.step().launch(kernel, blocks, threads, run))

    # What is behind it

    def has_chosen(self) -> None:
        assert threading.get_ident() in self.chosen, "this thread has not chosen its GPU"

    def queue(self, stream: int, job: Callable[[], None]) -> None:
        self.has_chosen()
        self.captured.get(stream, self.streams[stream]).append(job)

    def work(self, stream: int, jobs: int) -> None:
        for _ in range(jobs):
            self.streams[stream].pop(0)()
            self.done[stream] += 1

    def wait(self) -> None:
        """For all that is queued, as CUDA does before it frees memory."""
        for stream, jobs in self.streams.items():
            self.work(stream, len(jobs))

    def _allocate(self, where: str, size: int) -> Any:
        self.has_chosen()
        assert not self.captured, "memory is allocated while a stream is captured"
        both = ("device", "host") if self.integrated else ("device",)
        used = sum(len(block) for kind in both for block in self.blocks[kind].values())
        if where in both and used + size > self.memory:
            return CudaError.cudaErrorMemoryAllocation
        block = (ctypes.c_byte * size)(*([-1] * min(size, 4096)))  # NaN as float32
        self.blocks[where][ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def check(self, where: str, address: int, size: int) -> None:
        """The memory is there; the GPU sees the host's as well."""
        blocks = self.blocks["host"] | (self.blocks["device"] if where == "device" else {})
        assert len(blocks[address]) >= size, f"{where} memory at {address}"


class GpuToy(ToyEngine):
    """`ToyEngine` with its arrays in the fake GPU's memory."""

    runtime, device = "toy", "cuda:0"

    def __init__(self, cuda: FakeCuda, capturable: bool = True, **shape: Any) -> None:
        super().__init__(**shape)
        self.cuda, self.capturable = cuda, capturable
        self.gpu = gpu()
        self.stream = new_stream(self.gpu)
        self.concurrent = False  # type: ignore[misc]
        self.questions: list[int] = []  # of each evaluation that was queued

    def resident(self, batch: int, addresses: Any) -> Any:
        specs = self.inputs | self.outputs

        def array(name: str) -> np.ndarray:
            shape = (batch, *(size or 1 for size in specs[name].shape[1:]))
            size = int(np.prod(shape)) * specs[name].dtype.itemsize
            self.cuda.check("device", addresses[name], size)
            memory = (ctypes.c_byte * size).from_address(addresses[name])
            return np.frombuffer(memory, specs[name].dtype).reshape(shape)

        arrays = {name: array(name) for name in specs}

        def run() -> None:
            answer = ToyEngine.__call__(self, {name: arrays[name] for name in self.inputs})
            np.copyto(arrays["prediction"], answer["prediction"])

        def queue() -> None:
            self.check_open()
            self.questions.append(batch)
            self.cuda.queue(self.stream, run)

        queue.capturable = self.capturable  # type: ignore[attr-defined]
        return queue

    def check_open(self) -> None:
        if self.closed:
            raise ClosedError("the engine was closed; open it again")

    def close(self) -> None:
        if not self.closed:
            self.cuda.cudaStreamSynchronize(self.stream)
            self.cuda.cudaStreamDestroy(self.stream)
        super().close()


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity


class FakeTensorRT(ModuleType):
    """`tensorrt`, as far as it is used. `said` is what the builder was told."""

    ILogger = ILogger
    IProgressMonitor = object
    DataType = SimpleNamespace(FLOAT="FLOAT", INT64="INT64")
    TensorIOMode = SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT")
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    BuilderFlag = SimpleNamespace(TF32="TF32")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")
    MemoryPoolType = SimpleNamespace(WORKSPACE="WORKSPACE")

    def __init__(self, cuda: FakeCuda, name: str = "tensorrt", version: str = "10.3.0") -> None:
        super().__init__(name)
        self.cuda, self.__version__ = cuda, version
        self.builds: list[dict[str, Any]] = []
        self.build_fails = self.context_fails = self.slow = self.cancelled = False

    def Builder(self, logger: Any) -> Any:
        return Builder(self, logger)

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        def parse(model: bytes) -> bool:
            network.model = model
            with OnnxRuntimeEngine(model, device="cpu") as engine:
                network.inputs = [
                    SimpleNamespace(name=name, shape=(-1, *spec.shape[1:]))
                    for name, spec in engine.inputs.items()
                ]
            network.num_inputs = len(network.inputs)
            return True

        return SimpleNamespace(parse=parse, num_errors=0)

    def Runtime(self, logger: Any) -> Any:
        def deserialize_cuda_engine(data: bytes) -> Any:
            head, _, model = data.partition(b"\n")
            try:
                said = json.loads(head)
            except ValueError:
                said = {}
            if said.get("version") != self.__version__:
                logger.log(Severity.ERROR, "The engine plan file is not compatible")
                return None
            return FakeEngine(self, said, model)

        return SimpleNamespace(deserialize_cuda_engine=deserialize_cuda_engine)


class Builder:
    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def create_network(self, flags: int) -> Any:
        assert flags == 1 << self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        network = SimpleNamespace(inputs=[])
        network.get_input = lambda i: network.inputs[i]
        return network

    def create_builder_config(self) -> Any:
        config = SimpleNamespace(timing=b"", limits={}, cleared=[], profiles=[])

        def take(data: bytes, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            if data == b"of another GPU":
                return False
            config.timing = data
            return True

        config.clear_flag = config.cleared.append
        config.set_memory_pool_limit = config.limits.__setitem__
        config.create_timing_cache = lambda data: None if data == b"damaged" else data
        config.set_timing_cache = take
        config.get_timing_cache = lambda: SimpleNamespace(serialize=lambda: config.timing + b"+")
        config.add_optimization_profile = config.profiles.append
        return config

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        set_shape = lambda name, *sizes: shapes.__setitem__(name, sizes)  # noqa: E731
        return SimpleNamespace(shapes=shapes, set_shape=set_shape)

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        monitor = config.progress_monitor
        monitor.phase_start("building", None, 2)
        give_up = time.monotonic() + 10
        while self.trt.slow and time.monotonic() < give_up:  # ends by being cancelled alone
            if not monitor.step_complete("building", 0):
                self.trt.cancelled = True
                return None
            time.sleep(0.01)
        monitor.phase_finish("building")
        (profile,) = config.profiles
        batches = {tuple(size[0] for size in sizes) for sizes in profile.shapes.values()}
        (profile_of_all,) = batches
        head = {"version": self.trt.__version__, "profile": profile_of_all}
        self.trt.builds.append(head | {"config": config, "shapes": profile.shapes})
        if self.trt.build_fails:
            self.logger.log(Severity.ERROR, "no tactic fits")
            return None
        return json.dumps(head).encode() + b"\n" + network.model


class FakeEngine:
    def __init__(self, trt: FakeTensorRT, said: dict[str, Any], model: bytes) -> None:
        self.trt, self.profile = trt, said["profile"]
        self.ort = OnnxRuntimeEngine(model, device="cpu", threads=1)
        self.specs = self.ort.inputs | self.ort.outputs
        self.num_io_tensors = len(self.specs)
        self.settings: list[Any] = []  # of each context
        self.device_memory_size_v2 = 4096

    def get_tensor_name(self, i: int) -> str:
        return list(self.specs)[i]

    def get_tensor_dtype(self, name: str) -> str:
        return "FLOAT" if self.specs[name].dtype == np.float32 else "INT64"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *(size or -1 for size in self.specs[name].shape[1:]))

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name in self.ort.inputs else "OUTPUT"

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [(size, *self.get_tensor_shape(name)[1:]) for size in self.profile]

    def create_execution_context(self, settings: Any) -> Any:
        self.settings.append(settings)
        return None if self.trt.context_fails else FakeContext(self)


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.engine.trt.cuda.check("device", address, size)
        self.memory = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profile
        self.shapes[name] = shape
        return bool(low <= shape[0] <= high)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.engine.trt.cuda.check("device", address, 1)
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.engine.trt.cuda.check("device", self.memory, 1)
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.engine.trt.cuda.queue(stream, lambda: self._run(shapes, addresses))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        ort, cuda = self.engine.ort, self.engine.trt.cuda
        feed = {}
        for name, spec in ort.inputs.items():
            size = int(np.prod(shapes[name])) * spec.dtype.itemsize
            cuda.check("device", addresses[name], size)
            memory = ctypes.string_at(addresses[name], size)
            feed[name] = np.frombuffer(memory, spec.dtype).reshape(shapes[name])
        for name, answer in ort(feed).items():
            cuda.check("device", addresses[name], answer.nbytes)
            ctypes.memmove(addresses[name], answer.ctypes.data, answer.nbytes)


def install(patch: pytest.MonkeyPatch) -> FakeTensorRT:
    """Make it a machine with one Orin and TensorRT 10.3; `.cuda` is its CUDA."""
    cuda = FakeCuda()
    trt = FakeTensorRT(cuda)
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = bindings.driver = cuda  # type: ignore[attr-defined]
    for name, module in {
        "cuda": ModuleType("cuda"), "cuda.bindings": bindings,
        "cuda.bindings.runtime": cuda, "cuda.bindings.driver": cuda,
        "tensorrt": trt, "tensorrt_rtx": None,
    }.items():  # fmt: skip
        patch.setitem(sys.modules, name, module)
    return trt
