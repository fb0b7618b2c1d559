"""What the figures of a comparison are of."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("ddpm-edge", "torch", "diffusers", "onnxruntime", "openvino", "numpy")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
MATRIX = 2048  # side of the dense product that gives the machine's peak


def machine() -> dict[str, Any]:
    """Processor, its measured peaks in GFLOP/s, versions, date."""
    import torch

    from ddpm_edge import processor

    there = processor.instructions()
    return {
        "processor": processor.name(),
        "cpus": processor.cpus(),
        "instructions": [name for name in INSTRUCTIONS if name in there],
        "peak_fp32_gflop_s": _peak(torch.rand(MATRIX, MATRIX)),
        "peak_bf16_gflop_s": _peak(torch.rand(MATRIX, MATRIX).bfloat16()),
        "python": platform.python_version(),
        "versions": dict(_installed()),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _peak(a: Any) -> float:
    """GFLOP/s of the fastest of some products of a matrix with itself."""
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * MATRIX**3 / min(seconds) / 1e9


def _installed() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            yield package, version(package)
