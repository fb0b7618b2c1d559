"""NVIDIA's CUDA, as far as engines and the loop need it: calls that raise, by cuda-bindings.

Neither torch nor PyCUDA is needed. TensorRT may crash on a machine without a working driver, so
`gpu` is asked before anything of TensorRT is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.errors import (
    DdpmEdgeError,
    EngineError,
    EngineLostError,
    RuntimeUnavailableError,
)

REMEDY = (
    "pip install 'ddpm-edge[tensorrt]', 'ddpm-edge[rtx]' for a desktop GPU, or on a Jetson "
    "'ddpm-edge[jetson]'"
)
# After one of these every further call of the process fails, whatever it asks for.
LOST = frozenset({
    "cudaErrorAssert", "cudaErrorContained", "cudaErrorContextIsDestroyed",
    "cudaErrorECCUncorrectable", "cudaErrorExternalDevice", "cudaErrorHardwareStackError",
    "cudaErrorIllegalAddress", "cudaErrorIllegalInstruction", "cudaErrorInvalidAddressSpace",
    "cudaErrorInvalidPc", "cudaErrorLaunchFailure", "cudaErrorLaunchTimeout",
    "cudaErrorMisalignedAddress", "cudaErrorMpsClientTerminated",
    "cudaErrorNvlinkUncorrectable", "cudaErrorTensorMemoryLeak", "cudaErrorUnknown",
})  # fmt: skip
ABSENT = frozenset({
    "cudaErrorInsufficientDriver", "cudaErrorNoDevice", "cudaErrorStubLibrary",
    "cudaErrorInitializationError", "cudaErrorSystemDriverMismatch", "cudaErrorSystemNotReady",
    "cudaErrorCompatNotSupportedOnDevice", "cudaErrorNotSupported", "cudaErrorOperatingSystem",
    "cudaErrorDevicesUnavailable",  # another process has it for itself, or nobody may
})  # fmt: skip


NON_BLOCKING = 1  # cudaStreamNonBlocking: does not wait for the legacy default stream
MAPPED = 2  # cudaHostAllocMapped: the GPU reads and writes it in place
WAIT_ASLEEP, NO_TIMES = 1, 2  # cudaEventBlockingSync, cudaEventDisableTiming
THREADS = 256  # of a block


class GPU(NamedTuple):
    """A device that CUDA sees.

    Attributes:
        number: N of "cuda:N".
        name: such as "Orin" or "NVIDIA GeForce RTX 4070".
        compute_capability: such as "8.7".
        memory: bytes in all; shared with the CPU where it is integrated.
        integrated: whether CPU and GPU share one memory, as on a Jetson.
        multiprocessors: how many; tells the GPUs of one name apart.
    """

    number: int
    name: str
    compute_capability: str
    memory: int
    integrated: bool
    multiprocessors: int

    @property
    def device(self) -> str:
        """What `device=` calls it."""
        return f"cuda:{self.number}"

    def __str__(self) -> str:
        return f"{self.name} ({self.device}, compute capability {self.compute_capability})"


def cudart() -> Any:
    """The module of cuda-bindings that holds the runtime API.

    Raises:
        RuntimeUnavailableError: it is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"cuda-bindings cannot be imported ({error}); {REMEDY}"
        ) from error
    return runtime


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime, or of the driver (cu...); its result, where it has one.

    Raises:
        RuntimeUnavailableError: there is no driver or no GPU.
        EngineLostError: the GPU is lost to this process.
        MemoryError: too little memory on the GPU.
        EngineError: anything else.
    """
    api = cudart()
    code, *values = getattr(api if name.startswith("cuda") else _driver(), name)(*arguments)
    if int(code) == 0:
        return values[0] if values else None
    code = api.cudaError_t(int(code))  # the driver's numbers are the same
    kind = code.name
    text = f"{name}: {kind}"
    _, words = api.cudaGetErrorString(code)
    if words:
        text += f", {words.decode() if isinstance(words, bytes) else words}"
    if kind in LOST:
        raise EngineLostError(
            f"the GPU is lost to this process ({text}); nothing on it works any more: restart the "
            "process, and look at `dmesg` for the driver's own words"
        )
    if kind == "cudaErrorMemoryAllocation":
        raise MemoryError(f"CUDA: {text}")
    if kind == "cudaErrorInitializationError":
        text += ", as in a forked child of a process that used the GPU: start it with 'spawn'"
    if kind in ABSENT:
        raise RuntimeUnavailableError(
            f"CUDA does not work here ({text}); `ddpm-edge doctor` says what is missing"
        )
    raise EngineError(f"CUDA failed: {text}")


def gpus() -> list[GPU]:
    """The GPUs that this process sees, by number.

    Raises:
        RuntimeUnavailableError: no cuda-bindings, no driver, or no GPU.
    """
    found = []
    for number in range(call("cudaGetDeviceCount")):
        p = call("cudaGetDeviceProperties", number)
        name = p.name.decode() if isinstance(p.name, bytes) else str(p.name)
        found.append(
            GPU(number, name.rstrip("\0"), f"{p.major}.{p.minor}", p.totalGlobalMem,
                bool(p.integrated), p.multiProcessorCount)
        )  # fmt: skip
    if not found:
        raise RuntimeUnavailableError("CUDA sees no GPU; is CUDA_VISIBLE_DEVICES set?")
    return found


def gpu(device: str | None = None) -> GPU:
    """The GPU called "cuda" or "cuda:N"; None = the first.

    Raises:
        RuntimeUnavailableError: it is not there, or the name is not one of a GPU.
    """
    kind, _, number = (device or "cuda").partition(":")
    if kind != "cuda" or not (number.isdecimal() or device in (None, "cuda")):
        raise RuntimeUnavailableError(f"TensorRT has no device {device!r}; use 'cuda' or 'cuda:N'")
    found = gpus()
    if int(number or 0) >= len(found):
        raise RuntimeUnavailableError(
            f"device {device!r} was asked for; there are {', '.join(map(str, found))}"
        )
    return found[int(number or 0)]


def use(gpu: GPU) -> None:
    """Make it the GPU of this thread's next calls."""
    call("cudaSetDevice", gpu.number)


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Leave this thread's GPU as it is: around what a garbage collection may do in any thread."""
    before = None
    with contextlib.suppress(DdpmEdgeError):  # on a lost GPU nothing works, nor does it matter
        before = call("cudaGetDevice")
    try:
        yield
    finally:
        if before is not None:
            with contextlib.suppress(DdpmEdgeError):
                call("cudaSetDevice", before)


def collected(close: Callable[[], None], pid: int) -> None:
    """Close what nobody closed; for a `__del__`, which may come at any time and in any thread.

    Args:
        close: what frees it.
        pid: of the process that made it: a forked child has neither its GPU nor its locks.
    """
    if os.getpid() == pid and not sys.is_finalizing():
        with contextlib.suppress(DdpmEdgeError, MemoryError), unchanged():
            close()


def new_stream(gpu: GPU) -> int:
    """A stream's address."""
    use(gpu)
    return int(call("cudaStreamCreateWithFlags", NON_BLOCKING))


class Memory:
    """Bytes on the current GPU, which the host writes and reads on a stream.

    Args:
        size: bytes.
        shared: whether host and GPU see the same bytes, in pinned memory of the host, so that
            nothing is copied. NVIDIA advises it where their memories are one, as on a Jetson
            (CUDA for Tegra, "Pinned Memory").
    """

    def __init__(self, size: int, shared: bool = False) -> None:
        self.size, self._shared = size, shared
        self._host: int | None = None
        if shared:
            self._host = int(call("cudaHostAlloc", size, MAPPED))
            self.address = int(call("cudaHostGetDevicePointer", self._host, 0))
        else:
            self.address = int(call("cudaMalloc", size))

    def write(self, array: Array, stream: int) -> None:
        """Set the first bytes; what was written before must have been taken over by now."""
        host = self.view(array.shape, array.dtype)
        np.copyto(host, array)
        self._copy(self.address, host.ctypes.data, host.nbytes, "HostToDevice", stream)

    def clear(self, size: int, stream: int) -> None:
        """Set so many bytes to 0."""
        call("cudaMemsetAsync", self.address, 0, size, stream)

    def read(self, shape: tuple[int, ...], dtype: Any, stream: int) -> Array:
        """What the first bytes will be when the stream comes to here; a view, valid from then."""
        host = self.view(shape, dtype)
        self._copy(host.ctypes.data, self.address, host.nbytes, "DeviceToHost", stream)
        return host

    def view(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """The host's side of the first bytes."""
        if self._host is None:
            self._host = int(call("cudaHostAlloc", self.size, MAPPED))
        memory = (ctypes.c_byte * self.size).from_address(self._host)
        size = int(np.prod(shape))
        return np.frombuffer(memoryview(memory), dtype, count=size).reshape(shape)

    def free(self) -> None:
        """Free it."""
        if not self._shared:
            call("cudaFree", self.address)
        if self._host is not None:
            call("cudaFreeHost", self._host)

    def _copy(self, to: int, source: int, size: int, direction: str, stream: int) -> None:
        if not self._shared:
            kind = getattr(cudart().cudaMemcpyKind, f"cudaMemcpy{direction}")
            call("cudaMemcpyAsync", to, source, size, kind, stream)


class Buffers:
    """Memory by name, which grows with what is asked for."""

    def __init__(self) -> None:
        self._memory: dict[str, Memory] = {}

    def of(self, name: str, size: int, shared: bool = False) -> Memory:
        """Memory of that name, `size` bytes or more."""
        if name not in self._memory or self._memory[name].size < size:
            if name in self._memory:
                self._memory.pop(name).free()
            self._memory[name] = Memory(size, shared)
        return self._memory[name]

    def free(self) -> None:
        """Free all of it."""
        while self._memory:
            self._memory.popitem()[1].free()


class Kernels:
    """The kernels of a PTX, each of which takes one address.

    Raises:
        EngineError: the driver cannot compile it for the current GPU.
    """

    def __init__(self, ptx: bytes, *names: str) -> None:
        self._module = call("cuModuleLoadData", ptx + b"\0")
        self._kernels = {
            name: call("cuModuleGetFunction", self._module, name.encode()) for name in names
        }

    def launch(self, name: str, threads: int, argument: int, stream: int) -> None:
        """Queue a kernel of at least so many threads; of one, exactly."""
        value = ctypes.c_void_p(argument)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(value))
        block = min(threads, THREADS)
        call(
            "cuLaunchKernel", self._kernels[name], -(-threads // block), 1, 1, block, 1, 1, 0,
            stream, ctypes.addressof(pointers), 0,
        )  # fmt: skip

    def free(self) -> None:
        """Unload them."""
        call("cuModuleUnload", self._module)


def capture(queue: Callable[[], object], stream: int) -> Any:
    """What `queue` queues on the stream, as a graph to launch; nothing of it runs.

    Raises:
        EngineError: something in it cannot be captured.
    """
    # A generator that Python collects meanwhile could queue what it still has to copy.
    collects = gc.isenabled()
    gc.disable()
    mode = cudart().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    try:
        call("cudaStreamBeginCapture", stream, mode)
        queue()
        graph = call("cudaStreamEndCapture", stream)
    except BaseException:
        with contextlib.suppress(EngineError):  # what was captured is broken; the stream is free
            call("cudaGraphDestroy", call("cudaStreamEndCapture", stream))
        raise
    finally:
        if collects:
            gc.enable()
    try:
        return call("cudaGraphInstantiate", graph, 0)
    finally:
        call("cudaGraphDestroy", graph)
