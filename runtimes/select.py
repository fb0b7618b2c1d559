"""Which runtime runs a model: the one asked for, or the best that works here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from ddpm_edge import checks
from ddpm_edge.errors import RuntimeUnavailableError
from ddpm_edge.runtimes import onnx_runtime
from ddpm_edge.runtimes.base import Engine

MAX_THREADS = 1024

log = logging.getLogger("ddpm_edge")

Opener = Callable[[str | Path | bytes, str | None, int | None], Engine]

# Best first: "auto" takes the first one that opens.
RUNTIMES: dict[str, Opener] = {onnx_runtime.NAME: onnx_runtime.OnnxRuntimeEngine}


def open_engine(
    model: str | Path | bytes,
    runtime: str = "auto",
    device: str | None = None,
    threads: int | None = None,
) -> Engine:
    """Open a model with a runtime.

    Args:
        model: an .onnx file, or its bytes (inputs `x`, `t` and perhaps `label`; output
            `prediction`).
        runtime: a name in `RUNTIMES`, or "auto": the best one that works here, logged.
        device: "cpu", "cuda" or "cuda:N"; None = the runtime's best.
        threads: CPU threads of one call, >= 1; None = the runtime's choice.

    Raises:
        RuntimeUnavailableError: what was asked for by name, or anything at all, is not there.
        EngineError: the model cannot be loaded.
    """
    if threads is not None:
        threads = checks.whole("threads", threads, most=MAX_THREADS)
    if runtime != "auto" and runtime not in RUNTIMES:
        raise RuntimeUnavailableError(
            f"unknown runtime {runtime!r}; runtimes are auto, {', '.join(RUNTIMES)}"
        )
    names = list(RUNTIMES) if runtime == "auto" else [runtime]
    reasons: list[str] = []
    for name in names:
        try:
            engine = RUNTIMES[name](model, device, threads)
        except RuntimeUnavailableError as error:
            reasons.append(str(error))
            continue
        log.info("runtime %s on %s", engine.runtime, engine.device)
        return engine
    raise RuntimeUnavailableError("; ".join(reasons))
