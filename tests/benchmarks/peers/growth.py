"""How time and memory grow with the batch, the steps, the side of the image and n.

python growth.py MEMORY_N     (used by `memory`: samples n images, prints the peak)
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCHES = (1, 2, 4, 8, 16, 32, 64)
STEPS = (1, 3, 10, 30, 100, 300, 1000)
SIDES = (16, 24, 32, 48, 64)
MANY = (16, 1_000, 10_000)  # images


def growth() -> dict[str, Any]:
    """Milliseconds, each with the power of the quantity that fits best, and megabytes."""
    from ddpm_edge import Generator

    with Generator.load(device="cpu", runtime="onnxruntime") as generator:
        batch = {n: timed(lambda n=n: generator.sample(n, batch=n, steps=3)) / 3 for n in BATCHES}
        steps = {n: timed(lambda n=n: generator.sample(1, steps=n), once=n > 100) for n in STEPS}
    side = {n: a_step_at(n) for n in SIDES}
    curves = {"ms a step by batch": batch, "ms by steps": steps, "ms a step by side": side}
    return {
        "curves": {title: fitted(ms) for title, ms in curves.items()},
        "peak_mb_by_n": {str(n): memory(n) for n in MANY},
    }


def timed(call: Callable[[], object], once: bool = False) -> float:
    """Milliseconds of a call, the median of seven after one to warm up."""
    seconds = []
    for _ in range(2 if once else 8):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) * 1e3


def a_step_at(side: int) -> float:
    """Milliseconds of a step of a `small` network, random weights, gray images of this side."""
    import torch

    from ddpm_edge import Generator, Schedule
    from ddpm_edge.export import export
    from ddpm_edge.train.unet import UNet, UNetConfig

    torch.manual_seed(0)
    shape = (1, side, side)
    network = UNet(UNetConfig.preset("small", shape))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        export(network, Schedule.linear(), path, sample_shape=shape)
        with Generator.load(path, device="cpu", runtime="onnxruntime") as generator:
            return timed(lambda: generator.sample(1, steps=5)) / 5


def fitted(ms: dict[int, float]) -> dict[str, Any]:
    """The measurements, and the power of a straight line through their logarithms."""
    power = np.polyfit(np.log([*ms]), np.log([*ms.values()]), 1)[0]
    return {"ms": {str(n): value for n, value in ms.items()}, "power": float(power)}


def memory(n: int) -> float:
    """Peak memory of a process that makes n images of one step, 10**6 bytes."""
    done = subprocess.run([sys.executable, __file__, str(n)], check=True, capture_output=True)
    return float(done.stdout)


def main() -> None:
    from contenders import peak_memory_mb

    from ddpm_edge import Generator

    with Generator.load(device="cpu", runtime="onnxruntime") as generator:
        images = generator.sample(int(sys.argv[1]), steps=1, seed=0)
    print(peak_memory_mb() - images.nbytes / 1e6)


if __name__ == "__main__":
    main()
