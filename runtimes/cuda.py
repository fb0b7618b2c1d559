"""NVIDIA's CUDA runtime, as far as an engine needs it: calls that raise, by cuda-bindings.

Neither torch nor PyCUDA is needed. TensorRT may crash on a machine without a working driver, so
`gpu` is asked before anything of TensorRT is touched.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ddpm_edge.errors import EngineError, EngineLostError, RuntimeUnavailableError

REMEDY = (
    "pip install 'ddpm-edge[tensorrt]', 'ddpm-edge[rtx]' for a desktop GPU, or on a Jetson "
    "'ddpm-edge[jetson]'"
)
# After one of these every further call of the process fails, whatever it asks for.
LOST = frozenset({
    "cudaErrorAssert", "cudaErrorContained", "cudaErrorContextIsDestroyed",
    "cudaErrorDevicesUnavailable", "cudaErrorECCUncorrectable", "cudaErrorExternalDevice",
    "cudaErrorHardwareStackError", "cudaErrorIllegalAddress", "cudaErrorIllegalInstruction",
    "cudaErrorInvalidAddressSpace", "cudaErrorInvalidPc", "cudaErrorLaunchFailure",
    "cudaErrorLaunchTimeout", "cudaErrorMisalignedAddress", "cudaErrorMpsClientTerminated",
    "cudaErrorNvlinkUncorrectable", "cudaErrorTensorMemoryLeak", "cudaErrorUnknown",
})  # fmt: skip
ABSENT = frozenset({
    "cudaErrorInsufficientDriver", "cudaErrorNoDevice", "cudaErrorStubLibrary",
    "cudaErrorInitializationError", "cudaErrorSystemDriverMismatch", "cudaErrorSystemNotReady",
    "cudaErrorCompatNotSupportedOnDevice", "cudaErrorNotSupported", "cudaErrorOperatingSystem",
})  # fmt: skip


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


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime; its result, where it has one.

    Raises:
        RuntimeUnavailableError: there is no driver or no GPU.
        EngineLostError: the GPU is lost to this process.
        MemoryError: too little memory on the GPU.
        EngineError: anything else.
    """
    api = cudart()
    code, *values = getattr(api, name)(*arguments)
    if int(code) == 0:
        return values[0] if values else None
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
