"""What every runtime's adapter promises, and the check of inputs that all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

from ddpm_edge.arrays import Array
from ddpm_edge.errors import EngineError
from ddpm_edge.runtimes.cuda import GPU


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one input or output; None in `shape` is a dimension that may vary."""

    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"{self.dtype} ({sizes})"


class Engine(Protocol):
    """An open model. Close it, or use it as a context manager.

    Attributes:
        runtime: name of the runtime that runs it, such as "onnxruntime".
        device: where it really runs, such as "cpu" or "cuda:0".
        concurrent: whether calls from several threads may overlap.
        inputs, outputs: what the model takes and gives, by name.
    """

    runtime: str
    device: str
    concurrent: bool
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]

    @property
    def max_batch(self) -> int | None:
        """The largest batch of a call; None = what memory allows."""
        ...

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the model; the outputs are the caller's to keep.

        Whatever interrupts the main thread (Ctrl-C, a signal handler of the app that raises) gets
        out of a long call within moments, if the runtime can end one early.

        Raises:
            EngineError: an input is missing, unknown, or of another shape or dtype; the runtime
                failed.
            ClosedError: the engine was closed.
            MemoryError: too little memory for this batch; a smaller one still works.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds; calling it again does nothing.

        Where calls may overlap, one that is under way in another thread still finishes.
        """
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, *exc: object) -> None: ...


class Resident(Protocol):
    """An evaluation whose arrays stay on the GPU.

    Attributes:
        capturable: whether a CUDA graph may hold it, from its second call on.
    """

    capturable: bool

    def __call__(self) -> None:
        """Queue it on the engine's stream, or evaluate it there.

        Raises:
            EngineError: the runtime failed.
            ClosedError: the engine was closed.
        """
        ...


class GpuEngine(Engine, Protocol):
    """An engine that can also evaluate arrays which stay on the GPU; its calls may not overlap.

    Attributes:
        gpu: where.
        stream: the CUDA stream that it works on; None = it cannot here, for the reason that was
            logged.
    """

    gpu: GPU
    stream: int | None

    def check_open(self) -> None:
        """Raise what every call of it would: ClosedError, or that the GPU is lost."""
        ...

    def resident(self, batch: int, addresses: Mapping[str, int]) -> Resident:
        """An evaluation of a batch whose inputs and outputs are at these addresses of the GPU.

        Raises:
            EngineError: the engine does not take such a batch.
            ClosedError: the engine was closed.
            MemoryError: too little memory on the GPU.
        """
        ...


class WrappedEngine:
    """An engine around another: whoever inherits changes what a call does. One call at a time.

    `direct`: the engine for evaluations whose arrays stay on a GPU, which go past the wrapper; None
    = there are none.
    """

    concurrent = False
    direct: Engine | None = None

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.runtime, self.device = engine.runtime, engine.device
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self.max_batch = engine.max_batch

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate the model (see `Engine`)."""
        return self._engine(arrays)

    def close(self) -> None:
        """Close the engine inside (see `Engine`)."""
        self._engine.close()

    def __enter__(self) -> WrappedEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def gpu_engine(engine: Engine) -> GpuEngine | None:
    """The engine, or the one that a wrapper lets through, if its arrays can stay on a GPU."""
    inside = engine.direct if isinstance(engine, WrappedEngine) else engine
    return None if getattr(inside, "stream", None) is None else cast(GpuEngine, inside)


def check_inputs(specs: Mapping[str, TensorSpec], arrays: Mapping[str, Array]) -> int:
    """The batch size of `arrays`; EngineError unless they are exactly what `specs` describe."""
    if specs.keys() != arrays.keys():
        raise EngineError(
            f"the model takes inputs {', '.join(specs)}; got {', '.join(arrays) or 'none'}"
        )
    for name, spec in specs.items():
        array = arrays[name]
        fits = len(array.shape) == len(spec.shape) and all(
            want is None or want == got for want, got in zip(spec.shape, array.shape, strict=True)
        )
        if not fits or array.dtype != spec.dtype:
            raise EngineError(f"input {name!r} must be {spec}; got {array.dtype} {array.shape}")
    batches = {name: len(arrays[name]) for name in specs}
    if len(set(batches.values())) != 1 or 0 in batches.values():
        raise EngineError(f"all inputs must have the same batch size >= 1; got {batches}")
    return next(iter(batches.values()))
