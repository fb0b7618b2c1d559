"""A loop that must keep up: every small frame is made larger in at most so many milliseconds.

What is not finished by the deadline is shown as far as it came. `ddpm-edge bench` tells how long a
step takes here, and so how many `steps` fit: fewer steps that finish are better than many that do
not.
"""

import sys

import numpy as np

from ddpm_edge import AveragePool, Generator, Restore

deadline_ms = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
frames = int(sys.argv[2]) if len(sys.argv) > 2 else 20

with Generator.load() as generator:
    _, height, width = generator.sample_shape
    generator.warmup()
    y, x = np.mgrid[: height // 2, : width // 2]
    milliseconds, stopped = [], 0
    for i in range(frames):
        small = (127 + 120 * np.sin((x + i) / 3) * np.cos(y / 4)).astype(np.uint8)  # the camera
        task = Restore(small, AveragePool(2))
        result = generator.run(task=task, steps=8, seed=0, deadline_ms=deadline_ms)
        milliseconds.append(result.milliseconds)
        stopped += result.stopped
print(f"{frames} frames, deadline {deadline_ms:g} ms: median {np.median(milliseconds):.1f} ms, "
      f"longest {max(milliseconds):.1f} ms, {stopped} stopped early")  # fmt: skip
