"""Which runtime runs a model: the one asked for, or the best that works here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ddpm_edge import checks
from ddpm_edge.errors import EngineError, EngineMissingError, RuntimeUnavailableError
from ddpm_edge.runtimes import choice, onnx_runtime, openvino_runtime, trt
from ddpm_edge.runtimes.base import Engine
from ddpm_edge.runtimes.engine_cache import cache_directory

MAX_THREADS = 1024

log = logging.getLogger("ddpm_edge")


class Opening(NamedTuple):
    """What an engine is opened with; see `open_engine`."""

    model: bytes
    variant: str
    device: str | None
    threads: int | None
    cache_dir: str | Path | None


def _onnx_runtime(o: Opening) -> Engine:
    return onnx_runtime.OnnxRuntimeEngine(o.model, o.device, o.threads)


def _tensorrt(o: Opening) -> Engine:
    return trt.open_built(o.model, o.variant, o.device, o.cache_dir)


def _openvino(o: Opening) -> Engine:
    return openvino_runtime.OpenVinoEngine(o.model, o.device, o.threads)


# Best first: "auto" takes the first one that opens.
RUNTIMES: dict[str, Callable[[Opening], Engine]] = {
    trt.NAME: _tensorrt,
    onnx_runtime.NAME: _onnx_runtime,
    openvino_runtime.NAME: _openvino,
}


def open_engine(
    model: str | Path | bytes,
    runtime: str = "auto",
    device: str | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    variant: str = "fp32",
) -> Engine:
    """Open a model with a runtime.

    Args:
        model: an .onnx file, or its bytes (inputs `x`, `t` and perhaps `label`; output
            `prediction`).
        runtime: a name in `RUNTIMES`, or "auto": the one that was measured to be the fastest
            (`ddpm_edge.bench.choose`), or else the best that works here without building anything;
            logged.
        device: "cpu", "cuda" or "cuda:N"; None = the runtime's best.
        threads: CPU threads of one call, >= 1; None = the runtime's choice. TensorRT needs none.
        cache_dir: where engines that were built on this device, and what was measured on it, are;
            None = the user's cache.
        variant: precision of the model.

    Raises:
        RuntimeUnavailableError: what was asked for by name, or anything at all, is not there.
        EngineMissingError: TensorRT was asked for by name, and has no engine of this model.
        EngineError: the model cannot be loaded.
        MemoryError: too little memory for it.
    """
    if threads is not None:
        threads = checks.whole("threads", threads, most=MAX_THREADS)
    if runtime != "auto" and runtime not in RUNTIMES:
        raise RuntimeUnavailableError(
            f"unknown runtime {runtime!r}; runtimes are auto, {', '.join(RUNTIMES)}"
        )
    opening = Opening(model_bytes(model), variant, device, threads, cache_dir)
    if runtime != "auto":
        return _said(RUNTIMES[runtime](opening))
    reasons: list[str] = []
    failed: Exception | None = None
    for name in _order(opening):
        try:
            return _said(RUNTIMES[name](opening))
        except RuntimeUnavailableError as error:
            log.info("not %s: %s", name, error)
            reasons.append(f"{name}: {error}")
        except EngineMissingError as error:
            log.warning("not %s: %s; ddpm-edge build makes it", name, error)
            reasons.append(f"{name}: {error}; ddpm-edge build makes it")
        except EngineError as error:  # bf16 in ONNX Runtime on a CPU, above all
            log.info("not %s: %s", name, error)
            failed = failed or error
        except MemoryError as error:
            log.warning("not %s: %s", name, error)
            failed = failed or error
    raise failed or RuntimeUnavailableError("; ".join(reasons))


def _order(o: Opening) -> list[str]:
    """The runtimes, best first: as they stand, but those that were measured here by their figures.

    One that could not run then, such as TensorRT before its engine was built, keeps its place.
    """
    ms = choice.remembered(cache_directory(o.cache_dir), o.model, o.device)
    measured = sorted((name for name in RUNTIMES if name in ms), key=lambda name: ms[name])
    if measured:
        log.info("%s is the fastest here, by `ddpm-edge bench --choose`", measured[0])
    following = iter(measured)
    return [next(following) if name in ms else name for name in RUNTIMES]


def _said(engine: Engine) -> Engine:
    log.info("runtime %s on %s", engine.runtime, engine.device)
    return engine


def model_bytes(model: str | Path | bytes) -> bytes:
    """An .onnx file's bytes.

    Raises:
        EngineError: it cannot be read.
    """
    if isinstance(model, bytes):
        return model
    try:
        return Path(model).read_bytes()
    except OSError as error:
        raise EngineError(f"the model cannot be loaded: {error}") from error
