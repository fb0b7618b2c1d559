"""The whole path in Python: train on your arrays, export, sample without torch in the loop.

Needs ddpm-edge[cpu,export]. The data here are bright squares at random places.
"""

import sys
from pathlib import Path

import numpy as np

from ddpm_edge import Generator, Schedule, save_grid
from ddpm_edge.data import Dataset
from ddpm_edge.export import export_run
from ddpm_edge.train.run import record
from ddpm_edge.train.trainer import TrainOptions
from ddpm_edge.train.unet import UNetConfig

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "squares")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 1500

rng = np.random.default_rng(0)
images = np.zeros((2000, 1, 16, 16), np.uint8)  # (N, C, H, W)
for image in images:
    top, left = rng.integers(1, 9, size=2)
    image[:, top : top + 6, left : left + 6] = rng.integers(128, 256)

data = Dataset("squares", images)
config = UNetConfig.preset("tiny", data.sample_shape)
options = TrainOptions(steps=steps, batch=64, learning_rate=2e-3, warmup=100, ema=0.99)
for step in record(folder / "run", data, config, Schedule.linear(), options, preset="tiny"):
    if step.step % 100 == 0:
        print(f"step {step.step}: loss {float(step.loss):.4f}")

export_run(folder / "run", folder / "bundle", report=print)
with Generator.load(folder / "bundle") as generator:
    save_grid(generator.sample(16, seed=0), folder / "squares.png")
print(f"{folder}/squares.png")
