"""Paint over a dead region of a camera's frame: crop around it, inpaint, paste back.

A frame is BGR uint8 (480, 640, 3), as OpenCV's VideoCapture.read() gives it. Here it is made up: a
boot before a dark wall, which the built-in model knows. Yours needs a bundle that knows your scene.
"""

import sys

import numpy as np

from ddpm_edge import Generator, save_image


def repair(generator: Generator, frame: np.ndarray, dead: np.ndarray) -> np.ndarray:
    """The frame with its dead pixels, bool (480, 640), painted; all others as they were."""
    channels, height, width = generator.sample_shape
    middle = [(i.min() + i.max()) // 2 for i in np.nonzero(dead)]
    top = np.clip(middle[0] - height // 2, 0, frame.shape[0] - height)
    left = np.clip(middle[1] - width // 2, 0, frame.shape[1] - width)
    window = np.s_[top : top + height, left : left + width]
    crop, mask = frame[window][..., ::-1], dead[window]  # RGB
    if mask.sum() < dead.sum():
        raise SystemExit(f"the dead region is larger than the model's {height} x {width} pixels")
    if channels == 1:
        crop = crop.mean(axis=2, keepdims=True).astype(np.uint8)
    painted = generator.inpaint(crop, mask, seed=0)[0]  # (H, W, C)
    repaired = frame.copy()
    repaired[window][mask] = painted[mask][:, ::-1]  # BGR; gray goes into all three
    return repaired


output = sys.argv[1] if len(sys.argv) > 1 else "repaired.png"
with Generator.load() as generator:
    y, x = np.mgrid[:480, :640]
    frame = np.zeros((480, 640, 3), np.uint8)
    frame[200:228, 300:328] = generator.sample(1, label="ankle-boot", seed=4)[0]
    dead = (y - 216) ** 2 + (x - 313) ** 2 < 5**2
    frame[dead] = (255, 0, 255)
    save_image(repair(generator, frame, dead)[..., ::-1], output)  # RGB
print(f"{output}: {dead.sum()} pixels painted")
