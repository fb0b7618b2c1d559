"""Which runtime runs a model: the one asked for, or the best that works here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from ddpm_edge import checks
from ddpm_edge.errors import EngineError, EngineMissingError, RuntimeUnavailableError
from ddpm_edge.runtimes import onnx_runtime, trt
from ddpm_edge.runtimes.base import Engine

MAX_THREADS = 1024

log = logging.getLogger("ddpm_edge")

Opener = Callable[[bytes, str | None, int | None, trt.EngineStore], Engine]


def _onnx_runtime(
    model: bytes, device: str | None, threads: int | None, _: trt.EngineStore
) -> Engine:
    return onnx_runtime.OnnxRuntimeEngine(model, device, threads)


def _tensorrt(model: bytes, device: str | None, _: int | None, store: trt.EngineStore) -> Engine:
    return trt.open_stored(model, device, store)


# Best first: "auto" takes the first one that opens.
RUNTIMES: dict[str, Opener] = {trt.NAME: _tensorrt, onnx_runtime.NAME: _onnx_runtime}


def open_engine(
    model: str | Path | bytes,
    runtime: str = "auto",
    device: str | None = None,
    threads: int | None = None,
    store: trt.EngineStore | None = None,
) -> Engine:
    """Open a model with a runtime.

    Args:
        model: an .onnx file, or its bytes (inputs `x`, `t` and perhaps `label`; output
            `prediction`).
        runtime: a name in `RUNTIMES`, or "auto": the best one that works here without building
            anything, logged.
        device: "cpu", "cuda" or "cuda:N"; None = the runtime's best.
        threads: CPU threads of one call, >= 1; None = the runtime's choice.
        store: where TensorRT's engines are; None = in the user's cache.

    Raises:
        RuntimeUnavailableError: what was asked for by name, or anything at all, is not there.
        EngineMissingError: TensorRT was asked for by name, and has no engine of this model.
        EngineError: the model cannot be loaded.
    """
    if threads is not None:
        threads = checks.whole("threads", threads, most=MAX_THREADS)
    if runtime != "auto" and runtime not in RUNTIMES:
        raise RuntimeUnavailableError(
            f"unknown runtime {runtime!r}; runtimes are auto, {', '.join(RUNTIMES)}"
        )
    store = store or trt.EngineStore()
    data = model if isinstance(model, bytes) else _read(Path(model))
    if runtime != "auto":
        return _said(RUNTIMES[runtime](data, device, threads, store))
    reasons: list[str] = []
    for name, opener in RUNTIMES.items():
        try:
            return _said(opener(data, device, threads, store))
        except EngineMissingError as error:
            log.warning("not %s: %s", name, error)
            reasons.append(f"{name}: {error}")
        except RuntimeUnavailableError as error:
            log.info("not %s: %s", name, error)
            reasons.append(f"{name}: {error}")
    raise RuntimeUnavailableError("; ".join(reasons))


def _said(engine: Engine) -> Engine:
    log.info("runtime %s on %s", engine.runtime, engine.device)
    return engine


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError(f"the model cannot be loaded: {error}") from error
